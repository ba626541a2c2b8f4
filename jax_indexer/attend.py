"""sparse_attention: the consumer of the lists."""

import contextlib
import functools
import numbers
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jax_indexer import _arguments, reference
from jax_indexer.config import Implementation
from jax_indexer.layout import KVLayout, key_letters
from jax_indexer.sharding import Shard, by_shards
from jax_indexer.state import Selection


def sparse_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B _ _ H"],
    value: Float[Array, "B _ _ H'"],
    selection: Selection,
    *,
    scale: float | Array | None = None,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H'"]:
    """Softmax attention of every query head over the tokens listed for it.

    Args:
      query: [B, T, N, H], float32, bfloat16 or float16.
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"), the cache.
      value: like `key`, but with a head dimension H' of its own.
      selection: what `select` returned for an index of the cache's capacity S; only its indices
        are read.
      scale: of the logits; None for H**-0.5.
      kv_layout: order of the token and head axes of `key` and `value`.
      implementation: "xla", or None for the best one there is.

    Returns:
      [B, T, N, H'] in the query's dtype, computed in float32; zeros where nothing is listed.
      Gradients flow to query, key and value, whose gradients are 0 at tokens that are not listed.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.
      NotImplementedError: for an implementation that is not there.

    Source: CONTRACT.md, section 4.
    """
    _arguments.check_choice("implementation", implementation, (None, *get_args(Implementation)))
    if implementation == "triton":
        raise NotImplementedError('implementation: sparse_attention has "xla" only; use None')
    sizes = _arguments.Sizes()
    _arguments.check_key("key", key, "S", kv_layout, sizes)
    _arguments.check_array("query", query, _arguments.QUERY, sizes)
    _arguments.check_groups(sizes)
    _arguments.check_selection(selection, sizes)
    _arguments.check_key("value", value, "S", kv_layout, sizes, head="H'")
    return _attend(
        query,
        key,
        value,
        selection.indices,
        jax.device_put(_scale(scale, sizes["H"])),
        kv_layout=kv_layout,
    )


def _scale(scale: Any, head_dimension: int) -> Any:
    """The scale of logits as a float or a floating array; ValueError for anything else."""
    if scale is None:
        return head_dimension**-0.5
    if isinstance(scale, (jax.Array, np.ndarray)):
        if not scale.ndim and jnp.issubdtype(scale.dtype, jnp.floating):
            return scale
    elif isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        with contextlib.suppress(OverflowError):
            return float(scale)
    raise ValueError(f"scale: expected a real number, got {scale!r}; pass a float or None")


@functools.partial(jax.jit, static_argnames=("kv_layout",))
def _attend(query, key, value, indices, scale, *, kv_layout: KVLayout) -> Array:
    def on_shard(shard: Shard, query, key, value, indices, scale) -> Array:
        del shard
        return reference.attend(query, key, value, indices, scale, kv_layout)

    return by_shards(
        on_shard,
        has_gradients=True,
        query=("B T N H", query),
        key=(key_letters(kv_layout), key),
        value=(key_letters(kv_layout, head="H'"), value),
        selection=("B T N P", indices),
        scale=("", jnp.asarray(scale, jnp.float32)),
    )
