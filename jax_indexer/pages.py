"""Caches in pages: `page_table[b, i]` is the page that holds row b's positions from i * size on.

A cache of pages is [num_pages, size, K, H], or [num_pages, K, size, H]: what are rows and tokens of
another cache are pages and their slots. Positions stay those of rows, and so does the index.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32

from jax_indexer.layout import KVLayout, token_axis


def page_size_of(cache: Any, kv_layout: KVLayout) -> int:
    """Tokens of a page: a power of two."""
    return cache.shape[token_axis(kv_layout) - 4]


def page_and_slot(position: Any, size: int) -> tuple[Any, Any]:
    """The number of a position's page among those of its row, and its place there."""
    return position >> (size.bit_length() - 1), position & (size - 1)


def pages_spanned(tokens: int, size: int) -> int:
    """On how many pages so many neighbours lie, at the most."""
    return (tokens + size - 2) // size + 1


def has_pages(
    table: Int32[Array, "B pages"], tokens: int, size: int
) -> Callable[[Array, Array], Array]:
    """Whether rows have the pages of up to `tokens` tokens, by the first and how many there are."""

    def has(start: Int32[Array, "B"], number: Int32[Array, "B"]) -> Array:
        first, last = (page_and_slot(x, size)[0] for x in (start, start + number - 1))
        page = first[:, None] + np.arange(pages_spanned(tokens, size), dtype=np.int32)[None]
        found = jnp.take_along_axis(table, page, axis=1, mode="fill", fill_value=-1)
        return jnp.all((found >= 0) | (page > last[:, None]), axis=1)

    return has


def in_rows(
    cache: Float[Array, "*layers pages _ _ H"],
    table: Int32[Array, "B pages_of_row"] | None,
    kv_layout: KVLayout,
    layer: Int32[Array, ""] | None,
    capacity: int | None = None,
) -> Float[Array, "*layers B _ _ H"]:
    """A copy of a cache in rows, of one layer if there are several; what has no page is zeros.

    Without a table that is the cache itself.
    """
    if table is None:
        return cache
    size = page_size_of(cache, kv_layout)
    layers = () if layer is None else (jnp.clip(layer, 0, len(cache) - 1),)
    page = jnp.clip(table, 0, cache.shape[-4] - 1)
    found = cache.at[(*layers, page)].get(mode="clip")
    found = jnp.where(jnp.expand_dims(table >= 0, (2, 3, 4)), found, 0)
    axis = token_axis(kv_layout)
    found = jnp.moveaxis(found, 1, axis)  # pages beside their slots
    shape = *found.shape[:axis], table.shape[1] * size, *found.shape[axis + 2 :]
    found = found.reshape(shape)
    if capacity is not None:
        found = found[:, :capacity] if kv_layout == "BSKH" else found[:, :, :capacity]
    return found if layer is None else found[None]


def write_pages(
    cache: Float[Array, "*layers pages _ _ H"],
    new: Float[Array, "B _ _ H"],
    start: Int32[Array, "B"],
    taken: Int32[Array, "B"],
    table: Int32[Array, "B pages_of_row"],
    kv_layout: KVLayout,
    layer: Int32[Array, ""] | None,
) -> Float[Array, "*layers pages _ _ H"]:
    """Puts each row's first `taken` new tokens in their places; none goes where no page is."""
    new = new if kv_layout == "BSKH" else new.swapaxes(1, 2)
    token = np.arange(new.shape[1], dtype=np.int32)[None]
    page, slot = page_and_slot(start[:, None] + token, page_size_of(cache, kv_layout))
    page = jnp.take_along_axis(table, page, axis=1, mode="fill", fill_value=-1)
    is_written = (token < taken[:, None]) & (page >= 0)
    page = jnp.minimum(page, np.int32(cache.shape[-4] - 1))
    page = jnp.where(is_written, page, np.int32(cache.shape[-4]))[..., None]
    head = np.arange(new.shape[2], dtype=np.int32)[None, None]
    slot = slot[..., None]
    place = (page, slot, head) if kv_layout == "BSKH" else (page, head, slot)
    layers = () if layer is None else (jnp.clip(layer, 0, len(cache) - 1),)
    return cache.at[(*layers, *place)].set(new, mode="drop")
