"""How heads, tokens and subspaces are laid out."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int32, Shaped

KVLayout = Literal["BSKH", "BKSH"]
Grouping = Literal["contiguous", "strided"]


def power_of_2_from(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def token_axis(kv_layout: KVLayout) -> int:
    """The axis of keys and values that counts tokens."""
    return kv_layout.index("S")


def head_axis(kv_layout: KVLayout) -> int:
    """The axis of keys and values that counts kv heads."""
    return kv_layout.index("K")


def key_letters(kv_layout: KVLayout, tokens: str = "S", head: str = "H") -> str:
    """The axes of keys or values, of which `tokens` names one and `head` the last."""
    return f"B {tokens} K {head}" if kv_layout == "BSKH" else f"B K {tokens} {head}"


def cache_letters(kv_layout: KVLayout, in_pages: bool, head: str = "H") -> str:
    """The axes of a cache of keys or values, in rows or in pages."""
    letters = key_letters(kv_layout, head=head)
    return letters.replace("B", "page").replace("S", "slot") if in_pages else letters


def head_major(key: Shaped[Array, "B _ _ H"], kv_layout: KVLayout) -> Shaped[Array, "B K S H"]:
    """Keys or values [B, K, S, H] from either layout."""
    return key if kv_layout == "BKSH" else key.swapaxes(1, 2)


def read_tokens(
    cache: Float[Array, "*layers B _ _ H"],
    place: Int32[Array, "B K n"],
    kv_layout: KVLayout,
    layer: Int32[Array, ""] | None,
) -> Float[Array, "B K n H"]:
    """Keys or values at some positions of each kv head, of one layer if there are several."""
    if layer is None:
        # The lists follow the cache's layout, so that the cache itself is never transposed.
        flat = place if kv_layout == "BKSH" else place.swapaxes(1, 2)
        taken = jnp.take_along_axis(cache, flat[..., None], axis=token_axis(kv_layout))
        return taken if kv_layout == "BKSH" else taken.swapaxes(1, 2)
    batch, kv_heads, _ = place.shape
    layer = jnp.clip(layer, 0, cache.shape[0] - 1)
    row = np.arange(batch, dtype=np.int32)[:, None, None]
    head = np.arange(kv_heads, dtype=np.int32)[:, None][None]
    index = (head, place) if kv_layout == "BKSH" else (place, head)
    return cache.at[(layer, row, *index)].get(mode="clip")


def dimension_of(
    subspace: Any, d: Any, num_subspaces: int, dimensions: int, grouping: Grouping
) -> Any:
    """The dimension of a head that is the d-th of a subspace."""
    if grouping == "contiguous":
        return subspace * dimensions + d
    return d * num_subspaces + subspace


def subvectors(
    key: Float[Array, "*batch H"], num_subspaces: int, grouping: Grouping
) -> Float[Array, "*batch M D"]:
    """Cuts the head dimension into `num_subspaces` parts."""
    if grouping == "contiguous":
        return key.reshape(*key.shape[:-1], num_subspaces, -1)
    return key.reshape(*key.shape[:-1], -1, num_subspaces).swapaxes(-1, -2)


def subvectors_of(
    key: Float[Array, "*batch H"],
    at: Sequence[Any],
    sizes: Sequence[int],
    subspace: Any,
    num_subspaces: int,
    grouping: Grouping,
) -> Float[Array, "*sizes D"]:
    """A slice of `key` along all axes but the last, of which it takes one subspace."""
    dimensions = key.shape[-1] // num_subspaces
    if grouping == "contiguous":
        return lax.dynamic_slice(key, [*at, subspace * dimensions], [*sizes, dimensions])
    parts = key.reshape(*key.shape[:-1], dimensions, num_subspaces)
    return lax.dynamic_slice(parts, [*at, 0, subspace], [*sizes, dimensions, 1])[..., 0]


def by_kv_head(x: Shaped[Array, "B T N *rest"], num_kv_heads: int) -> Shaped[Array, "B K TG *rest"]:
    """Groups query heads by the kv head they share: [B, T, N, ...] to [B, K, T * G, ...]."""
    batch, tokens, heads, *rest = x.shape
    grouped = x.reshape(batch, tokens, num_kv_heads, heads // num_kv_heads, *rest)
    return grouped.swapaxes(1, 2).reshape(batch, num_kv_heads, -1, *rest)


def by_query_head(
    x: Shaped[Array, "B K TG *rest"], num_tokens: int
) -> Shaped[Array, "B T N *rest"]:
    """The inverse of `by_kv_head`."""
    batch, kv_heads, group, *rest = x.shape
    grouped = x.reshape(batch, kv_heads, num_tokens, group // num_tokens, *rest)
    return grouped.swapaxes(1, 2).reshape(batch, num_tokens, -1, *rest)
