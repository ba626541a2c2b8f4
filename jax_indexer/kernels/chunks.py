"""Many tokens at once into caches, and tokens out of them, wherever they lie."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32

from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.attend import Written, padded, read_rows
from jax_indexer.kernels.tuning import H100, Tuning
from jax_indexer.layout import KVLayout, head_axis, token_axis
from jax_indexer.recent import is_last_in_place, place_of, recent_size
from jax_indexer.reference import Caches, Room
from jax_indexer.state import Recent


class PutInputs(NamedTuple):
    """Tokens [B, t, K, H] or head-major, where they go, and what they go into."""

    start: Any  # i32[B]
    taken: Any  # i32[B]
    key_new: Any
    value_new: Any
    key: Any
    value: Any
    slot_of: Any
    position_in: Any


def put_kernel(
    program,
    inputs: PutInputs,
    outputs: Written,
    *,
    config: IndexerConfig | None,
    kv_layout: KVLayout,
    block: int,
):
    """A block of tokens of one kv head; with a config, into what is recent."""
    tokens, kv_heads = (inputs.key_new.shape[of(kv_layout)] for of in (token_axis, head_axis))
    num_blocks = pl.cdiv(tokens, block)
    first = program % num_blocks * block
    kv_head, row = program // num_blocks % kv_heads, program // (num_blocks * kv_heads)
    start, taken = inputs.start[row], inputs.taken[row]

    @pl.when(first < taken)
    def _():
        token = first + jnp.arange(block, dtype=jnp.int32)
        is_taken = token < taken
        position = start + token
        for new, into in ((inputs.key_new, outputs.key), (inputs.value_new, outputs.value)):
            found = read_rows(new, kv_layout, row, kv_head, token, is_taken)
            d = jnp.arange(found.shape[1], dtype=jnp.int32)[None, :]
            to, wanted = position[:, None], is_taken
            at = (row, to, kv_head, d) if kv_layout == "BSKH" else (row, kv_head, to, d)
            if config is not None:
                wanted &= is_last_in_place(position, start + taken, config)
                near = jnp.where(wanted, place_of(position, config), recent_size(config))
                at = row, near[:, None], kv_head, d
            mask = jnp.broadcast_to(wanted[:, None] & (d < into.shape[3]), found.shape)
            backend.store(into.at[at], found, mask=mask)
        if outputs.slot_of is None:
            return
        # What is kept of positions that are written over is so no more.
        capacity, kept = outputs.slot_of.shape[2], outputs.position_in.shape[2]
        to = jnp.where(is_taken, position, capacity)
        slot = backend.load(outputs.slot_of.at[row, kv_head, to], mask=is_taken, other=-1)
        backend.barrier()
        nothing = jnp.full(block, -1, jnp.int32)
        backend.store(outputs.slot_of.at[row, kv_head, to], nothing, mask=is_taken)
        is_kept = slot >= 0
        of_slot = outputs.position_in.at[row, kv_head, jnp.where(is_kept, slot, kept)]
        backend.store(of_slot, nothing, mask=is_kept)


def put(
    new: Caches,
    room: Room,
    into: Caches | Recent,
    config: IndexerConfig,
    kv_layout: KVLayout,
    layer: Array | None,
    tuning: Tuning = H100,
) -> Caches | Recent:
    """Puts tokens into caches, or into what is recent of caches in host memory.

    Args:
      new: keys and values [B, t, K, H] or head-major, on the device.
      room: where they go, and how many of each row.
      into: of all layers if there are any.
      config: of the caches.
      kv_layout: of tokens and caches.
      layer: None where there are no layers.
      tuning: block sizes.

    Returns:
      What they went into, in the memory of that before.
    """
    is_recent = isinstance(into, Recent)
    old = Written(into.key, into.value)
    if is_recent:
        old = Written(into.key, into.value, into.slot_of, into.position_in)
    size = padded(max(x.shape[-1] for x in new))
    block = max(tuning.copied_tile // size, 1)
    batch = new.key.shape[0]
    tokens, kv_heads = (new.key.shape[of(kv_layout)] for of in (token_axis, head_axis))
    what = backend.Launch(
        functools.partial(
            put_kernel, config=config if is_recent else None, kv_layout=kv_layout, block=block
        ),
        PutInputs(room.start, room.taken, *new, *old),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), old),
        programs=batch * kv_heads * pl.cdiv(tokens, block),
        in_place=Written._fields,
        state=Written._fields,
        layer=layer,
    )
    made = backend.launch(what, num_warps=tuning.copied_warps)
    if not is_recent:
        return Caches(made.key, made.value)
    return dataclasses.replace(into, **made._asdict())


class TakeInputs(NamedTuple):
    """A cache, and positions i32[B, n]."""

    cache: Any
    position: Any


def take_kernel(program, inputs: TakeInputs, tokens, *, kv_layout: KVLayout, block: int):
    """A block of tokens of one kv head."""
    number, kv_heads = (tokens.shape[of(kv_layout)] for of in (token_axis, head_axis))
    num_blocks = pl.cdiv(number, block)
    first = program % num_blocks * block
    kv_head, row = program // num_blocks % kv_heads, program // (num_blocks * kv_heads)
    token = first + jnp.arange(block, dtype=jnp.int32)
    exists = token < number
    position = backend.load(
        inputs.position.at[row, jnp.where(exists, token, 0)], mask=exists, other=0
    )
    found = read_rows(inputs.cache, kv_layout, row, kv_head, position, exists)
    d = jnp.arange(found.shape[1], dtype=jnp.int32)[None, :]
    to = jnp.where(exists, token, number)[:, None]
    at = (row, to, kv_head, d) if kv_layout == "BSKH" else (row, kv_head, to, d)
    mask = jnp.broadcast_to(exists[:, None] & (d < tokens.shape[3]), found.shape)
    backend.store(tokens.at[at], found, mask=mask)


def take(
    cache: Float[Array, "*layers B _ _ H"],
    position: Int32[Array, "B n"],
    kv_layout: KVLayout,
    layer: Array | None,
    tuning: Tuning = H100,
) -> Float[Array, "B _ _ H"]:
    """Tokens at some positions of each row, in the cache's layout, on the device."""
    block = max(tuning.copied_tile // padded(cache.shape[-1]), 1)
    shape = list(cache.shape[-4:])
    shape[token_axis(kv_layout)] = position.shape[1]
    what = backend.Launch(
        functools.partial(take_kernel, kv_layout=kv_layout, block=block),
        TakeInputs(cache, position),
        jax.ShapeDtypeStruct(tuple(shape), cache.dtype),
        programs=shape[0] * shape[head_axis(kv_layout)] * pl.cdiv(position.shape[1], block),
        state=("cache",),
        layer=layer,
    )
    return backend.launch(what, num_warps=tuning.copied_warps)
