"""What of a cache in host memory lies on the device too: sink, window, and rows that were listed.

Every head reads sink and window at every step, so they are here alone read from: a step's reads go
over the bus for heavy tokens only, and of these only for what the steps before have not listed.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int32

from jax_indexer.config import IndexerConfig
from jax_indexer.layout import KVLayout, token_axis
from jax_indexer.reference import Caches, Room
from jax_indexer.state import MOST_NEW, UNSETTLED, Recent, layer_of, put_layer

# Lists of one query head that have room among the rows that are kept for a kv head, unless said.
KEPT_LISTS = 16


def ring_size(config: IndexerConfig) -> int:
    """Tokens of the ring.

    What was written last lies below the high water. Values are summed UNSETTLED tokens before its
    window, while it rises by as many as MOST_NEW; windows of rows that went back begin later.
    """
    return config.window_size + UNSETTLED + MOST_NEW


def recent_size(config: IndexerConfig) -> int:
    """R: tokens of the sink, and of the ring."""
    return config.sink_size + ring_size(config)


def place_of(position: Array, config: IndexerConfig) -> Array:
    """Where a position of the sink, or one of the newest, lies among these."""
    ring = jnp.full_like(position, ring_size(config))
    in_ring = config.sink_size + lax.rem(position, ring)
    return jnp.where(position < config.sink_size, position, in_ring)


def is_last_in_place(position: Array, length: Array, config: IndexerConfig) -> Array:
    """Of positions before a row's length: which are the last ones of their places."""
    return (position < config.sink_size) | (position >= length - ring_size(config))


def kept_size(config: IndexerConfig) -> int:
    """n: rows that are kept for each kv head, unless said."""
    return max(KEPT_LISTS * config.pool.heavy_size, 1)


def empty_recent(
    batch: int,
    capacity: int,
    kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    config: IndexerConfig,
    dtype: np.dtype,
    kept: int,
) -> Recent:
    """Nothing is recent in rows without tokens; there is room for so many rows that are kept."""

    def rows(number: int, size: int) -> Float[Array, "B _ K H"]:
        return jnp.zeros((batch, number, kv_heads, size), dtype)

    return Recent(
        key=rows(recent_size(config), head_dim),
        value=rows(recent_size(config), value_head_dim),
        kept_key=rows(kept, head_dim),
        kept_value=rows(kept, value_head_dim),
        slot_of=jnp.full((batch, kv_heads, capacity), -1, jnp.int32),
        position_in=jnp.full((batch, kv_heads, kept), -1, jnp.int32),
        next_slot=jnp.zeros((batch, kv_heads), jnp.int32),
        sink_size=config.sink_size,
    )


def write_recent(
    recent: Recent,
    new: Caches,
    room: Room,
    config: IndexerConfig,
    kv_layout: KVLayout,
    layer: Int32[Array, ""] | None,
) -> Recent:
    """What is recent after tokens were written to a layer, in plain jnp.

    What is kept of the layer is forgotten: it may be what was written over.
    """
    one = layer_of(recent, layer)
    tokens = new.key.shape[token_axis(kv_layout)]
    token = np.arange(tokens, dtype=np.int32)[None]
    position, length = room.start[:, None] + token, (room.start + room.taken)[:, None]
    is_there = (token < room.taken[:, None]) & is_last_in_place(position, length, config)
    place = jnp.where(is_there, place_of(position, config), np.int32(recent_size(config)))
    row = np.arange(place.shape[0], dtype=np.int32)[:, None]

    def put(old: Array, new: Array) -> Array:
        new = new if kv_layout == "BSKH" else new.swapaxes(1, 2)
        return old.at[row, place].set(new, mode="drop")

    written = dataclasses.replace(
        one,
        key=put(one.key, new.key),
        value=put(one.value, new.value),
        slot_of=jnp.full_like(one.slot_of, -1),
        position_in=jnp.full_like(one.position_in, -1),
        next_slot=jnp.zeros_like(one.next_slot),
    )
    return put_layer(recent, written, layer)
