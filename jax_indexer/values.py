"""Sums of values by code (`ValueSums`): begun, emptied, and grown with their rows."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int32, UInt8

from jax_indexer.config import IndexerConfig
from jax_indexer.layout import KVLayout, read_tokens, token_axis
from jax_indexer.state import MOST_NEW, ValueSums, layer_of, put_layer, summed_until

# Tokens summed at once, by a product with a row of zeros and ones for each code.
SUMMED_AT_ONCE = 1024


def sums_by(config: IndexerConfig) -> tuple[int, int]:
    """M' and C', the codes that sums are kept for."""
    if config.estimate_rest == "codes":
        return config.num_subspaces, config.num_centroids
    return 1, 1


def summed_codes(
    codes: UInt8[Array, "*batch M n"], config: IndexerConfig
) -> UInt8[Array, "*batch M_ n"]:
    """The codes that tokens are summed by: one for all of them with "mean"."""
    if config.estimate_rest == "mean":
        return jnp.zeros_like(codes[..., :1, :])
    return codes & np.uint8(config.num_centroids - 1)


def no_values(batch: int, kv_heads: int, value_size: int, config: IndexerConfig) -> ValueSums:
    """The sums of empty rows."""
    by = batch, kv_heads, *sums_by(config)
    return ValueSums(jnp.zeros((*by, value_size), jnp.float32), jnp.zeros(by, jnp.int32))


def empty_values(values: ValueSums, rows: Bool[Array, "B"]) -> ValueSums:
    """The sums with some rows empty."""
    chosen = rows[:, None, None, None]
    return ValueSums(
        jnp.where(chosen[..., None], 0, values.sums), jnp.where(chosen, 0, values.counts)
    )


def add_values(
    values: ValueSums,
    value: Float[Array, "*layers B _ _ H_"],
    codes: UInt8[Array, "*layers B K M S"],
    before: Int32[Array, "B"],
    after: Int32[Array, "B"],
    most: int,
    config: IndexerConfig,
    kv_layout: KVLayout,
    layer: Int32[Array, ""] | None,
) -> ValueSums:
    """Adds the values that are due when rows grow.

    Args:
      values: the sums so far.
      value: the cache after.
      codes: of all tokens.
      before: the high water of each row before, in 0..S.
      after: likewise, afterwards.
      most: by how many tokens a row grows, at the most.
      config: what the index was built with.
      kv_layout: of `value`.
      layer: None where the arrays have no axis of layers.

    Returns:
      The sums after.
    """
    first, last = (summed_until(x, config) for x in (before, after))
    if most <= MOST_NEW:
        return _add_few(values, value, codes, first, last, most, config, kv_layout, layer)
    one, value, codes = layer_of((values, value, codes), layer)
    return put_layer(values, add_many(one, value, codes, first, last, config, kv_layout), layer)


def _add_few(
    values: ValueSums,
    value: Array,
    codes: Array,
    first: Array,
    last: Array,
    most: int,
    config: IndexerConfig,
    kv_layout: KVLayout,
    layer: Array | None,
) -> ValueSums:
    batch, kv_heads, num_subspaces, capacity = codes.shape[-4:]
    new = np.arange(most, dtype=np.int32)[None]
    is_due = (new < (last - first)[:, None])[:, None]
    # The first candidate may lie far behind the cache.
    place = jnp.minimum(jnp.minimum(first, capacity)[:, None] + new, capacity - 1)
    place = jnp.broadcast_to(place[:, None], (batch, kv_heads, most))
    found = read_tokens(value, place, kv_layout, layer).astype(jnp.float32)
    is_due = (is_due & jnp.all(jnp.isfinite(found), axis=-1))[:, :, None]
    found = jnp.where(is_due[:, :, 0, :, None], found, 0)

    at = _at(layer, len(values.sums), batch, kv_heads, sums_by(config)[0])
    code = jnp.zeros_like(place)[:, :, None]
    if config.estimate_rest == "codes":
        of_codes = _at(layer, len(codes), batch, kv_heads, num_subspaces)
        code = codes.at[(*of_codes, place[:, :, None])].get(mode="clip")
        code = (code & np.uint8(config.num_centroids - 1)).astype(jnp.int32)
    code = jnp.where(is_due, code, np.int32(values.counts.shape[-1]))
    return ValueSums(
        values.sums.at[(*at, code)].add(found[:, :, None], mode="drop"),
        values.counts.at[(*at, code)].add(1, mode="drop"),
    )


def _at(layer: Array | None, layers: int, *sizes: int) -> tuple:
    """Indices of all rows, heads and subspaces of a layer, each along an axis of its own."""
    own = np.ix_(*(np.arange(size, dtype=np.int32) for size in sizes))
    front = () if layer is None else (jnp.clip(layer, 0, layers - 1),)
    return *front, *(x[..., None] for x in own)


def add_many(
    values: ValueSums,
    value: Float[Array, "B _ _ H_"],
    codes: UInt8[Array, "B K M S"],
    first: Int32[Array, "B"],
    last: Int32[Array, "B"],
    config: IndexerConfig,
    kv_layout: KVLayout,
) -> ValueSums:
    """Adds the values [first, last) of some tokens, by the codes of their keys.

    Row by row, so that those that do not grow cost little.
    """
    capacity, axis = codes.shape[-1], token_axis(kv_layout) - 1
    chunk = min(SUMMED_AT_ONCE, capacity)
    number_of = np.arange(values.counts.shape[-1], dtype=np.uint8)[:, None]

    def add_row(row) -> ValueSums:
        values, value, codes, first, last = row

        def add_chunk(i, values: ValueSums) -> ValueSums:
            start = jnp.minimum(i * chunk, capacity - chunk)  # the last chunk may overlap
            token = start + jnp.arange(chunk, dtype=jnp.int32)
            due = (token >= jnp.maximum(first, i * chunk)) & (token < last)
            found = lax.dynamic_slice_in_dim(value, start, chunk, axis).astype(jnp.float32)
            found = found if kv_layout == "BKSH" else found.swapaxes(0, 1)
            due = due[None] & jnp.all(jnp.isfinite(found), axis=-1)  # [K, chunk]
            code = summed_codes(lax.dynamic_slice_in_dim(codes, start, chunk, axis=2), config)
            has = (code[:, :, None] == number_of[None, None]) & due[:, None, None]
            found = jnp.where(due[..., None], found, 0)
            sums = jnp.einsum(
                "kmct,kth->kmch", has.astype(jnp.float32), found, precision=lax.Precision.HIGHEST
            )
            counts = jnp.sum(has, axis=-1, dtype=jnp.int32)
            return ValueSums(values.sums + sums, values.counts + counts)

        first = jnp.minimum(first, capacity)
        chunks = lax.div(jnp.minimum(last, capacity) + (chunk - 1), jnp.int32(chunk))
        return lax.fori_loop(lax.div(first, jnp.int32(chunk)), chunks, add_chunk, values)

    # Sums that begin as constants would not vary over devices as what is added does.
    zero = jnp.zeros_like(codes[:, :, :1, :1])
    sums = values.sums + zero[..., None].astype(jnp.float32)
    values = ValueSums(sums, values.counts + zero.astype(jnp.int32))
    return lax.map(add_row, (values, value, codes, first, last))


def mean_values(values: ValueSums) -> tuple[Float[Array, "B K M_ C_ H_"], Float[Array, "B K H_"]]:
    """The mean of each code's values, and that of all; an empty code has the mean of all."""
    sums, counts = jnp.sum(values.sums[:, :, 0], axis=2), jnp.sum(values.counts[:, :, 0], axis=2)
    of_all = sums / jnp.maximum(counts, 1).astype(jnp.float32)[..., None]
    of_codes = values.sums / jnp.maximum(values.counts, 1).astype(jnp.float32)[..., None]
    is_empty = (values.counts == 0)[..., None]
    return jnp.where(is_empty, of_all[:, :, None, None], of_codes), of_all
