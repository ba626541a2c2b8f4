"""The life of an index: built, grown, trained again, started again."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int32

from jax_indexer import _arguments, kmeans, reference
from jax_indexer.cells import empty_rows, no_cells, seal
from jax_indexer.config import Implementation, IndexerConfig
from jax_indexer.kernels import backend, centroid_sums, pipeline
from jax_indexer.kernels.chunks import take
from jax_indexer.kernels.step import Step
from jax_indexer.layout import KVLayout, head_axis, key_letters, token_axis
from jax_indexer.memory import is_on_host, moved_to_device, not_mapped
from jax_indexer.pages import in_rows
from jax_indexer.rope import COPIES, LookAhead, Rope, check_look_ahead
from jax_indexer.sharding import Shard, by_shards
from jax_indexer.state import (
    MOST_BACK,
    DecodeCache,
    PQIndex,
    Span,
    layer_of,
    put_layer,
    summed_until,
    varying_as,
)
from jax_indexer.values import add_many, empty_values, no_values

# Tokens of a cache in host memory that are read at once, and encoded.
ENCODED_AT_ONCE = 8192

CacheOrIndex = TypeVar("CacheOrIndex", DecodeCache, PQIndex)

# What is static about training.
TRAINED_BY = ("config", "ahead", "kv_layout", "implementation", "sequence_axis")


def build_index(
    key: Float[Array, "B _ _ H"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    *,
    value: Float[Array, "B _ _ H'"] | None = None,
    seed: int = 0,
    rope: Rope | None = None,
    look_ahead: int | None = None,
    copies: int = COPIES,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
    sequence_axis: str | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
) -> PQIndex:
    """Trains codebooks on the keys of a prompt and encodes all of them.

    Codebooks are trained by k-means for every (batch row, kv head, subspace) on the tokens in
    [init_offset, lengths[b]), or on a sample of `config.train_tokens` of them, and are float32. A
    subvector that is not finite, or whose squared norm is above 2**124, is not trained on; one that
    is not finite gets code 0. A row with fewer trainable keys than centroids uses these, repeated.

    Keys turn with their positions after RoPE, so codebooks of a prompt fit the prompt's phases and
    not those to come. With `rope` they are trained on `copies` of each key too, turned on to the
    next `look_ahead` positions: keys that come later will look like these.

    Args:
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"), float32, bfloat16 or float16: the cache
        at its full capacity S, garbage past each row's length.
      lengths: int32[B], tokens in each row; clipped to 0..S.
      config: static parameters.
      value: with `config.estimate_rest` the cache of values, like `key` but with a head dimension
        H' of its own; else None.
      seed: of the random numbers; the same seed gives the same index.
      rope: how the keys were turned; None to train on the keys alone.
      look_ahead: with `rope`, how many tokens are expected to be decoded.
      copies: with `rope`, of each key; more than 2 help where more is decoded than the prompt has.
      kv_layout: order of the token and head axes of `key`.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.
      sequence_axis: inside a `shard_map`, the axis of its mesh that S is split over, None where it
        is whole. `lengths` are of whole rows, and codebooks the same on all devices along it:
        those of one device, but for the order in which float32 sums are added. Exchanges, for each
        codebook: an `all_gather` of a count, 4 bytes a device, and two sums of C and of 63 keys,
        4 * D' bytes each; in every iteration one sum of 4 * C * (D' + 1) bytes; and where clusters
        are empty an `all_gather` of 4 * C * (D' + 1) bytes a device, and a sum of 4 bytes.
      page_table: int32[B, pages] for caches in pages, as `sparse_attention` takes it: they are
        copied into rows, of S = pages * page_size tokens, and trained on. None for caches in rows.

    Returns:
      A PQIndex with capacity S.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype, and for more kv heads than tokens,
        which a cache of the other layout would have.
      NotImplementedError: for an implementation that is not there, and for `rope` or
        `estimate_rest` with `sequence_axis`.

    Source: CONTRACT.md, section 4; the method is that of PQCache (arXiv 2407.12820).
    """
    _arguments.check_config(config)
    sizes = _arguments.Sizes(if_in_pages=_arguments.pages_fix(key))
    alone = _arguments.STACKED_ALONE
    _arguments.check_key("key", key, "S", kv_layout, sizes, stacked=alone, page_table=page_table)
    _arguments.check_subspaces("key", config, sizes)
    _arguments.check_page_table(page_table, sizes)
    _arguments.check_whole_pages(page_table, sequence_axis, key)
    ahead = check_look_ahead(rope, look_ahead, copies, sizes["H"])
    devices = check_split_training(sequence_axis, {"lengths": lengths}, config, ahead)
    if sizes["K"] > sizes["S"] * devices:  # nothing else here would tell that the axes are swapped
        raise ValueError(
            f"key: expected at most as many kv heads K as tokens S, got K={sizes['K']}, "
            f"S={sizes['S']}; pass the cache at its full capacity{sizes.understood('key')}"
        )
    _arguments.check_array("lengths", lengths, _arguments.NUMBERS, sizes)
    of_value = {"stacked": alone, "page_table": page_table}
    _arguments.check_value(value, config, kv_layout, sizes, **of_value)
    _arguments.check_seed(seed)
    shape = sizes["B"], sizes["K"], config.num_subspaces, sizes["S"]
    codes = jax.ShapeDtypeStruct(shape, np.uint8)
    check_training(implementation, config, sizes, key, codes)
    return _build(
        key,
        value,
        lengths,
        jax.device_put(np.uint32(seed)),
        page_table,
        config=config,
        ahead=ahead,
        kv_layout=kv_layout,
        implementation=implementation,
        sequence_axis=sequence_axis,
    )


def rebuild(
    index: PQIndex,
    key: Float[Array, "B _ _ H"],
    config: IndexerConfig,
    rows: Bool[Array, "B"],
    *,
    value: Float[Array, "B _ _ H'"] | None = None,
    lengths: Int32[Array, "B"] | None = None,
    seed: int = 0,
    rope: Rope | None = None,
    look_ahead: int | None = None,
    copies: int = COPIES,
    layer: int | Int32[Array, ""] | None = None,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
    sequence_axis: str | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
) -> PQIndex:
    """Trains new codebooks for some rows and encodes their tokens again; nothing else changes.

    Keys and values in host memory are read over the bus chunk by chunk, twice a key that is trained
    on; `config.train_tokens` must say how many these are. Their rows keep their high water unless
    `lengths` are given, which must then be those that were written last; other rows begin it anew.

    For between decode steps: when a short prompt has grown, when the keys have drifted away from
    the codebooks (`rebuild_gain` tells), or, with `lengths`, to put a new prompt into a row. A row
    so built equals what `build_index` makes of it, bit for bit with float32 codebooks.

    Args:
      index: the index; donate it to have it updated in place.
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"), the cache; of rows that are not rebuilt
        it may hold anything.
      config: what the index was built with.
      rows: bool[B], the rows to rebuild. The others cost little.
      value: with `config.estimate_rest` the cache of values, of which the same holds; else None.
      lengths: int32[B], the tokens these rows have from now on, clipped to 0..S; None for those
        they have.
      seed: of the random numbers.
      rope, look_ahead, copies: as in `build_index`.
      layer: which layer of index and cache, clipped to those there are, where their arrays have
        an axis of layers in front; None where they have none.
      kv_layout: order of the token and head axes of `key`.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.
      sequence_axis, page_table: as in `build_index`.

    Returns:
      A PQIndex of the same shapes.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.
      NotImplementedError: as in `build_index`, and for keys in host memory with `sequence_axis`.

    Source: CONTRACT.md, section 4.
    """
    of_cache = index, key, config, kv_layout, layer, page_table
    sizes = _arguments.check_with_cache(*of_cache, may_be_on_host=True)
    _arguments.check_whole_pages(page_table, sequence_axis, key)
    _arguments.check_array("rows", rows, _arguments.ROWS, sizes)
    of_value = {"may_be_on_host": True, "page_table": page_table}
    _arguments.check_value(value, config, kv_layout, sizes, **of_value)
    _arguments.check_streamed(key, value, config)
    if lengths is not None:
        _arguments.check_array("lengths", lengths, _arguments.NUMBERS, sizes)
    _arguments.check_seed(seed)
    ahead = check_look_ahead(rope, look_ahead, copies, sizes["H"])
    whole = {"lengths": lengths, "rows": rows}
    check_split_training(sequence_axis, whole, config, ahead, index, key)
    check_training(implementation, config, sizes, key, index)
    return _rebuild(
        index,
        key,
        value,
        lengths,
        rows,
        jax.device_put(np.uint32(seed)),
        _arguments.check_layer(layer),
        page_table,
        config=config,
        ahead=ahead,
        kv_layout=kv_layout,
        implementation=implementation,
        sequence_axis=sequence_axis,
    )


def rebuild_gain(
    index: PQIndex,
    key: Float[Array, "B _ _ H"],
    config: IndexerConfig,
    *,
    rope: Rope | None = None,
    look_ahead: int | None = None,
    copies: int = COPIES,
    layer: int | Int32[Array, ""] | None = None,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
    sequence_axis: str | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
) -> Float[Array, "B"]:
    """Says which rows `rebuild` would help: the share of their error that a first step removes.

    The squared quantization error of the trainable keys, less what it is when every centroid moves
    to the mean of the keys nearest to it, over that error: somewhat more than half of the share
    that a rebuild removes. On a language model's keys it is below 0.002 after training and above
    0.03 once the context has grown by a quarter, so a rebuild pays from about 0.02 on. It costs one
    k-means iteration over the cache, or over `config.train_tokens` tokens of it. A new key that is
    far from all others hides what they would gain: its error outweighs theirs, and one iteration
    removes little of it. One that was there when the codebooks were trained does not.

    What the means gain on a sample by chance alone is taken off where `train_tokens` makes one. A
    row with a codebook whose centroids are all equal, as when it was built from no more than
    `init_offset` tokens, gains 1. Under `shard_map` over heads each shard returns the number of its
    own heads.

    Args:
      index: the index.
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"), the cache.
      config: what the index was built with.
      rope, look_ahead, copies: as in `build_index`: copies of the keys count too.
      layer: which layer of index and cache, clipped to those there are, where their arrays have
        an axis of layers in front; None where they have none.
      kv_layout: order of the token and head axes of `key`.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.
      sequence_axis: as in `build_index`. Exchanges, for each codebook: an `all_gather` of a count,
        4 bytes a device, and sums of 63 keys, 4 * D' bytes each, of one iteration,
        4 * C * (D' + 1) bytes, and of errors, 8 bytes.
      page_table: as in `build_index`.

    Returns:
      float32[B], in 0..1; 0 for rows without an error, and for those whose error overflows
      float32.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.
      NotImplementedError: for an implementation that is not there.

    Source: CONTRACT.md, section 4.
    """
    sizes = _arguments.check_with_cache(index, key, config, kv_layout, layer, page_table)
    _arguments.check_whole_pages(page_table, sequence_axis, key)
    ahead = check_look_ahead(rope, look_ahead, copies, sizes["H"])
    check_split_training(sequence_axis, {}, config, ahead, index)
    check_training(implementation, config, sizes, key, index)
    return _rebuild_gain(
        index,
        key,
        _arguments.check_layer(layer),
        page_table,
        config=config,
        ahead=ahead,
        kv_layout=kv_layout,
        implementation=implementation,
        sequence_axis=sequence_axis,
    )


def reset(
    index: PQIndex,
    rows: Bool[Array, "B"],
    *,
    layer: int | Int32[Array, ""] | None = None,
    sequence_axis: str | None = None,
) -> PQIndex:
    """Empties some rows: their length becomes 0, and their codebooks stay until rebuilt.

    Args:
      index: the index.
      rows: bool[B], the rows to empty.
      layer: which layer of the index, clipped to those there are, where its arrays have an axis of
        layers in front; None for all of them.
      sequence_axis: inside a `shard_map`, the axis of its mesh that S is split over, None where it
        is whole. Nothing is exchanged: `rows` are the same on all devices along it.

    Returns:
      A PQIndex of the same shapes.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.

    Source: CONTRACT.md, section 4.
    """
    _arguments.check_index_type(index)
    stacked = layer is not None or getattr(index.lengths, "ndim", 1) == 2
    sizes = _arguments.Sizes(stacked=stacked)
    numbers = _arguments.NUMBERS.of(sizes)
    _arguments.check_array("index.lengths", index.lengths, numbers, sizes)
    _arguments.check_array("rows", rows, _arguments.ROWS, sizes)
    if index.cells is not None:
        _arguments.check_cells(index.cells, sizes)
    if index.values is not None:
        _arguments.check_fields("index.values", index.values, sizes)
    _arguments.check_high_water(index, sizes)
    whole = {"rows": rows} if sequence_axis is not None else {}
    _arguments.check_sequence_axis(sequence_axis, whole, {"index": index}, without={})
    return _reset(index, rows, _arguments.check_layer(layer))


def truncate(
    cache: CacheOrIndex,
    lengths: Int32[Array, "B"],
    *,
    layer: int | Int32[Array, ""] | None = None,
) -> CacheOrIndex:
    """Takes the last tokens of rows back, as drafts that were rejected; nothing else changes.

    A row gets the length that is wanted if that is at most its own and at most 8 below its high
    water, the most tokens it has had since it began: what is further back may be in the state of
    "cells" and in sums of values. Any other row keeps its length, and that is the report. An index
    that has neither goes back as far as is wanted. What is recent of a cache in host memory reaches
    back as far as a high water allows, so there has to be one.

    Args:
      cache: a DecodeCache or a PQIndex; donate it to have it updated in place.
      lengths: int32[B], tokens that rows are to have; their own for rows that keep all. Devices
        that share rows have the same.
      layer: which layer, clipped to those there are, where arrays have an axis of layers in front;
        None for all of them.

    Returns:
      The same, with other lengths.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.
      NotImplementedError: for a cache in host memory without `config.cells` or `estimate_rest`.

    Source: CONTRACT.md, section 4.
    """
    if isinstance(cache, DecodeCache):
        if cache.recent is not None and getattr(cache.index, "high_water", None) is None:
            raise NotImplementedError(
                f"cache: with {_arguments.IN_HOST_MEMORY} rows go back as far as their high water "
                "allows, which an index without cells and sums of values does not have; use "
                'cells=True or estimate_rest="codes"'
            )
        return dataclasses.replace(cache, index=truncate(cache.index, lengths, layer=layer))
    if not isinstance(cache, PQIndex):
        raise ValueError(
            f"cache: expected a DecodeCache or a PQIndex, got {type(cache).__name__}; "
            "pass what decode_attention or append returned"
        )
    stacked = layer is not None or getattr(cache.lengths, "ndim", 1) == 2
    sizes = _arguments.Sizes(stacked=stacked)
    numbers = _arguments.NUMBERS
    _arguments.check_array("index.lengths", cache.lengths, numbers.of(sizes), sizes)
    _arguments.check_array("lengths", lengths, numbers, sizes)
    _arguments.check_high_water(cache, sizes)
    _arguments.check_same_rows(lengths, cache)
    after = _truncated(cache.lengths, cache.high_water, lengths, _arguments.check_layer(layer))
    return dataclasses.replace(cache, lengths=after)


def with_cells(
    index: PQIndex,
    config: IndexerConfig,
    *,
    layer: int | Int32[Array, ""] | None = None,
    sequence_axis: str | None = None,
) -> PQIndex:
    """Makes the state of the "cells" selector for an index that was made without it.

    For an index from given codebooks and codes; `build_index` makes the state by itself, and all
    other functions keep it up to date. A row's high water becomes its length, if sums of values do
    not follow one already that `truncate` could have come from.

    Args:
      index: the index; a state that it has is made anew.
      config: with `cells=True`.
      layer: which layer of the index, clipped to those there are, where its arrays have an axis of
        layers in front and there is a state for the others; None for an index of one layer, or
        for all layers.
      sequence_axis: inside a `shard_map`, the axis of its mesh that S is split over, None where it
        is whole. Each device lists the positions that it holds; nothing is exchanged.

    Returns:
      A PQIndex with `cells`.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.

    Source: CONTRACT.md, section 4.
    """
    _arguments.check_config(config)
    _arguments.check_index_type(index)
    if not config.cells:
        raise ValueError("config.cells: expected True, got False; use dataclasses.replace")
    shape: tuple[int, ...] = getattr(index.codebooks, "shape", ())
    stacked = layer is not None or len(shape) == 6
    sizes = _arguments.Sizes(stacked=stacked)
    dimensions = 1
    if len(shape) == 5 + stacked:
        num_subspaces, dimensions = shape[2 + stacked], shape[4 + stacked]
        if num_subspaces != config.num_subspaces:
            raise ValueError(
                f"index.codebooks: expected M={config.num_subspaces} as in config, got "
                f"M={num_subspaces}; use the config that the index was built with"
            )
        dimensions -= config.metric == "ip"
    sizes.learn("index.codebooks", H=dimensions * config.num_subspaces)
    _arguments.check_quantizer(dataclasses.replace(index, cells=None), config, sizes)
    if layer is not None:
        _arguments.check_index(index, config, sizes)
    _arguments.check_sequence_axis(sequence_axis, {}, {"index": index}, without={})
    return _with_cells(
        index, _arguments.check_layer(layer), config=config, sequence_axis=sequence_axis
    )


def append(
    index: PQIndex,
    key_new: Float[Array, "B _ _ H"],
    config: IndexerConfig,
    *,
    value: Float[Array, "B _ _ H'"] | None = None,
    counts: Int32[Array, "B"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
    sequence_axis: str | None = None,
) -> PQIndex:
    """Encodes new tokens against the codebooks and appends them; never trains.

    A row takes all of its new tokens or none: one that would pass the capacity keeps its state,
    and its unchanged length is the report.

    Args:
      index: the index; donate it to have it updated in place.
      key_new: [B, t, K, H] ("BSKH") or [B, K, t, H] ("BKSH"), float32, bfloat16 or float16.
      config: what the index was built with.
      value: with `config.estimate_rest` the cache of values, those of the new tokens included,
        [B, S, K, H'] or head-major, behind an axis of layers if the index has one; else None.
      counts: int32[B], how many of the t tokens each row takes, clipped to 0..t; None for t.
      layer: which layer of the index, clipped to those there are, where its arrays have an axis of
        layers in front; None where they have none.
      kv_layout: order of the token and head axes of `key_new` and `value`.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.
      sequence_axis: inside a `shard_map`, the axis of its mesh that S is split over, None where it
        is whole. New tokens are the same on all devices along it, and kept by those that hold their
        positions; lengths are those of whole rows. Nothing is exchanged.

    Returns:
      A PQIndex of the same shapes.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype, and for t > S without `counts`.
      NotImplementedError: for an implementation that is not there.

    Source: CONTRACT.md, section 4.
    """
    _arguments.check_append(
        index, key_new, config, value, counts, layer, kv_layout, implementation, sequence_axis
    )
    return _append(
        index,
        key_new,
        value,
        counts,
        _arguments.check_layer(layer),
        config=config,
        kv_layout=kv_layout,
        implementation=implementation,
        sequence_axis=sequence_axis,
    )


def check_training(implementation, config, sizes, *operands) -> None:
    """Checks that "triton", if it is asked for, trains codebooks of these sizes."""
    dimensions = sizes["H"] // config.num_subspaces
    unsupported = centroid_sums.unsupported(config.num_centroids, dimensions)
    _arguments.check_implementation(implementation, *operands, unsupported=unsupported)


def check_split_training(
    sequence_axis: Any,
    whole: dict[str, Any],
    config: IndexerConfig,
    ahead: LookAhead | None,
    index: PQIndex | None = None,
    key: Array | None = None,
) -> int:
    """Checks that codebooks can be trained where S is split; over how many devices it is."""
    without = _arguments.sums_needed(config)
    if is_on_host(key):
        without |= {_arguments.IN_HOST_MEMORY: "chunks of a device's own positions"}
    if ahead is not None:
        without |= {"rope": "positions that are not known when the program is compiled"}
    whole = whole if sequence_axis is not None else {}
    return _arguments.check_sequence_axis(sequence_axis, whole, {"index": index}, without=without)


@functools.partial(backend.jit, static_argnames=())
def _reset(index: PQIndex, rows: Array, layer: Array | None) -> PQIndex:
    if index.lengths.ndim == 2:
        layers = len(index.lengths)
        number = jnp.arange(layers, dtype=jnp.int32)
        chosen = True if layer is None else number == jnp.clip(layer, 0, layers - 1)
        reset_one = lambda index, chosen: _emptied(index, rows & chosen)  # noqa: E731
        return jax.vmap(reset_one)(index, jnp.broadcast_to(chosen, (layers,)))
    return _emptied(index, rows)


def _kept(high_water: Array, lengths: Array) -> Array:
    """The high water where `truncate` could have come from it, else the length."""
    back = high_water - lengths
    return jnp.where((back >= 0) & (back <= MOST_BACK), high_water, lengths)


@functools.partial(backend.jit, static_argnames=())
def _truncated(
    lengths: Array, high_water: Array | None, wanted: Array, layer: Array | None
) -> Array:
    wanted = jnp.broadcast_to(wanted, lengths.shape)
    is_taken = (wanted >= 0) & (wanted <= lengths)
    if high_water is not None:
        is_taken &= wanted >= high_water - MOST_BACK
    if layer is not None:
        layer = jnp.clip(layer, 0, len(lengths) - 1)
        is_taken &= (jnp.arange(len(lengths), dtype=jnp.int32) == layer)[:, None]
    return jnp.where(is_taken, wanted, lengths)


def _emptied(index: PQIndex, rows: Array) -> PQIndex:
    high_water = index.high_water
    return dataclasses.replace(
        index,
        lengths=jnp.where(rows, 0, index.lengths),
        high_water=None if high_water is None else jnp.where(rows, 0, high_water),
        cells=None if index.cells is None else empty_rows(index.cells, rows),
        values=None if index.values is None else empty_values(index.values, rows),
    )


@functools.partial(backend.jit, static_argnames=("config", "sequence_axis"))
def _with_cells(
    index: PQIndex, layer: Array | None, *, config: IndexerConfig, sequence_axis: str | None
) -> PQIndex:
    def on_shard(shard: Shard, index: PQIndex) -> PQIndex:
        del shard
        batch, kv_heads, _, capacity = index.codes.shape
        cells = no_cells(batch, kv_heads, capacity, config)
        every_row = jnp.ones_like(index.lengths, bool)
        span = Span.of(sequence_axis, capacity)
        lengths = jnp.clip(index.lengths, 0, span.capacity if span else capacity)
        high_water = lengths
        if index.values is not None and index.high_water is not None:
            high_water = _kept(index.high_water, lengths)
        cells = seal(cells, index.codes, high_water, every_row, config, span)
        return dataclasses.replace(index, cells=cells, high_water=high_water)

    def make(index: PQIndex) -> PQIndex:
        return by_shards(on_shard, index=(None, index))

    bare = dataclasses.replace(index, cells=None)
    if layer is not None:
        made = make(layer_of(bare, layer))
        made = made.cells, made.high_water
        cells, high_water = put_layer((index.cells, index.high_water), made, layer)
        return dataclasses.replace(index, cells=cells, high_water=high_water)
    return lax.map(make, bare) if index.lengths.ndim == 2 else make(bare)


def empty_index(
    config: IndexerConfig,
    batch: int,
    capacity: int,
    kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    devices: int = 1,
) -> PQIndex:
    """An index of rows without tokens; its codebooks are zeros, float32.

    Its arrays are those of one of the devices that share the rows.
    """
    of_subspaces = (batch, kv_heads, config.num_subspaces)
    augmented = config.metric == "ip"
    size = head_dim // config.num_subspaces + augmented
    return PQIndex(
        codebooks=jnp.zeros((*of_subspaces, config.num_centroids, size), jnp.float32),
        codes=jnp.zeros((*of_subspaces, capacity), jnp.uint8),
        lengths=jnp.zeros(batch, jnp.int32),
        phi=jnp.zeros(of_subspaces, jnp.float32) if augmented else None,
        cells=no_cells(batch, kv_heads, capacity, config) if config.cells else None,
        values=(
            no_values(batch, kv_heads, value_head_dim, config) if config.estimate_rest else None
        ),
        capacity=capacity * devices,
        high_water=(jnp.zeros(batch, jnp.int32) if config.cells or config.estimate_rest else None),
    )


@functools.partial(backend.jit, static_argnames=TRAINED_BY)
def _build(
    key: Array,
    value: Array | None,
    lengths: Array,
    seed: Array,
    page_table: Array | None,
    *,
    config: IndexerConfig,
    ahead: LookAhead | None,
    kv_layout: KVLayout,
    implementation: Implementation | None,
    sequence_axis: str | None,
) -> PQIndex:
    key = in_rows(key, page_table, kv_layout, None)
    value = None if value is None else in_rows(value, page_table, kv_layout, None)

    def on_shard(shard: Shard, key, value, lengths, seed) -> PQIndex:
        batch, capacity = key.shape[0], key.shape[token_axis(kv_layout)]
        kv_heads = key.shape[head_axis(kv_layout)]
        sizes = [key.shape[-1], 0 if value is None else value.shape[-1]]
        span = Span.of(sequence_axis, capacity)
        devices = span.devices if span else 1
        empty = empty_index(config, batch, capacity, kv_heads, *sizes, devices=devices)
        every_row = jnp.ones(batch, bool)
        arguments = empty, key, value, lengths, every_row, seed, None
        return _rebuilt(shard, *arguments, config, ahead, kv_layout, implementation, sequence_axis)

    return by_shards(
        on_shard,
        key=(key_letters(kv_layout), key),
        value=(key_letters(kv_layout, head="H'"), value),
        lengths=("B", lengths),
        seed=("", seed),
    )


@functools.partial(backend.jit, static_argnames=TRAINED_BY)
def _rebuild(
    index: PQIndex,
    key: Array,
    value: Array | None,
    lengths: Array | None,
    rows: Array,
    seed: Array,
    layer: Array | None,
    page_table: Array | None,
    *,
    config: IndexerConfig,
    ahead: LookAhead | None,
    kv_layout: KVLayout,
    implementation: Implementation | None,
    sequence_axis: str | None,
) -> PQIndex:
    places = page_table, kv_layout, layer, index.codes.shape[-1]
    key = in_rows(key, *places)
    value = None if value is None else in_rows(value, *places)
    one, of_cache = layer_of(index, layer), layer
    goes_on, lengths = lengths is None, one.lengths if lengths is None else lengths
    if is_on_host(key):
        key, value = not_mapped((key, value), "key")
    else:
        (key, value), of_cache = layer_of((key, value), layer), None
    rebuilt = by_shards(
        functools.partial(
            _rebuilt,
            config=config,
            ahead=ahead,
            kv_layout=kv_layout,
            implementation=implementation,
            sequence_axis=sequence_axis,
            goes_on=goes_on,
        ),
        index=(None, one),
        key=(key_letters(kv_layout), key),
        value=(key_letters(kv_layout, head="H'"), value),
        lengths=("B", lengths),
        rows=("B", rows),
        seed=("", seed),
        layer=("", of_cache),
    )
    return put_layer(index, rebuilt, layer)


def _rebuilt(
    shard: Shard,
    index: PQIndex,
    key: Array,
    value: Array | None,
    lengths: Array,
    rows: Array,
    seed: Array,
    layer: Array | None,
    config: IndexerConfig,
    ahead: LookAhead | None,
    kv_layout: KVLayout,
    implementation: Implementation | None,
    sequence_axis: str | None,
    goes_on: bool = False,
) -> PQIndex:
    span = Span.of(sequence_axis, index.codes.shape[-1])
    capacity = span.capacity if span else index.codes.shape[-1]
    # The other rows have no token to train on and none to encode.
    lengths, read, of_keys = jnp.where(rows, jnp.clip(lengths, 0, capacity), 0), None, None
    if is_on_host(key):
        read = functools.partial(
            _taken, kv_layout=kv_layout, layer=layer, implementation=implementation
        )
        of_keys = functools.partial(read, key)
    keys = kmeans.training_set(key, lengths, config, kv_layout, ahead, span, of_keys)
    first_head = shard.first_head(index.codes.shape[1])
    trained = kmeans.train(keys, lengths, seed, first_head, config, kv_layout, implementation)

    codebooks = jnp.where(
        jnp.expand_dims(rows, (1, 2, 3, 4)),
        trained.astype(index.codebooks.dtype),
        index.codebooks,
    )
    phi = index.phi
    if phi is not None and keys.phi is not None:
        phi = jnp.where(jnp.expand_dims(rows, (1, 2)), keys.phi, phi)
    started = dataclasses.replace(_emptied(index, rows), codebooks=codebooks, phi=phi)
    arguments = config, kv_layout, implementation
    if read is not None:
        high_water = lengths
        if goes_on and index.high_water is not None:
            # The ring ends with what was written last, and no row goes back behind it.
            high_water = jnp.where(rows, _kept(index.high_water, lengths), 0)
        return _appended_in_chunks(started, key, value, lengths, high_water, *arguments, read)
    if span is None:
        return _appended(started, key, value, lengths, *arguments)
    # Each device encodes what it holds, as if it were all.
    bare = dataclasses.replace(started, cells=None, high_water=None)
    bare, counts = varying_as((bare, span.clip(lengths)), key)
    codes = _appended(bare, key, value, counts, *arguments).codes
    lengths = jnp.where(rows, lengths, started.lengths)
    cells, high_water = started.cells, started.high_water
    if cells is not None and high_water is not None:
        high_water = jnp.where(rows, lengths, high_water)
        cells = seal(cells, codes, high_water, rows, config, span)
    kept = {"cells": cells, "high_water": high_water}
    return dataclasses.replace(started, codes=codes, lengths=lengths, **kept)


def _taken(
    cache: Array,
    position: Array,
    *,
    kv_layout: KVLayout,
    layer: Array | None,
    implementation: Implementation | None,
) -> Array:
    """Tokens of a cache in host memory at int32[B, n] positions of each row, on the device."""

    def xla(cache, position, layer):
        cache = layer_of(moved_to_device(cache), layer)
        place = position[:, :, None, None]
        place = place if kv_layout == "BSKH" else place.swapaxes(1, 2)
        return jnp.take_along_axis(cache, place, axis=token_axis(kv_layout))

    def triton(cache, position, layer):
        return take(cache, position, kv_layout, layer)

    return backend.dispatch(xla, triton, cache, position, layer, implementation=implementation)


def _appended_in_chunks(
    index: PQIndex,
    key: Array,
    value: Array | None,
    lengths: Array,
    high_water: Array,
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: Implementation | None,
    read: Callable[[Array, Array], Array],
) -> PQIndex:
    """Encodes keys in host memory, of rows without tokens or of none, a chunk at a time."""
    capacity = index.codes.shape[-1]
    chunk = min(ENCODED_AT_ONCE, capacity)
    number = np.arange(chunk, dtype=np.int32)[None]

    def add(i, state):
        bare, values = state
        first = i * chunk
        position = jnp.minimum(jnp.zeros_like(lengths)[:, None] + first + number, capacity - 1)
        counts = jnp.clip(lengths - first, 0, chunk)
        keys = read(key, position)
        bare = _appended(bare, keys, None, counts, config, kv_layout, implementation)
        if values is not None:
            assert value is not None
            codes = jnp.take_along_axis(bare.codes, position[:, None, None], axis=3)
            until = summed_until(high_water, config)
            begin, end = (jnp.clip(x - first, 0, chunk) for x in (config.first_candidate, until))
            begin = jnp.broadcast_to(begin, end.shape)
            end = jnp.where(counts > 0, end, begin)
            of_chunk = read(value, position), codes, begin, end
            values = add_many(values, *of_chunk, config, kv_layout)
        return bare, values

    bare = dataclasses.replace(index, cells=None, values=None, high_water=None)
    chunks = lax.div(jnp.max(lengths) + (chunk - 1), jnp.int32(chunk))
    bare, values = lax.fori_loop(0, chunks, add, (bare, index.values))
    cells, followed = index.cells, index.high_water
    if followed is not None:
        followed = jnp.where(lengths > 0, high_water, followed)
    if cells is not None and followed is not None:
        cells = seal(cells, bare.codes, followed, lengths > 0, config)
    return dataclasses.replace(bare, cells=cells, values=values, high_water=followed)


@functools.partial(backend.jit, static_argnames=TRAINED_BY)
def _rebuild_gain(
    index: PQIndex,
    key: Array,
    layer: Array | None,
    page_table: Array | None,
    *,
    config: IndexerConfig,
    ahead: LookAhead | None,
    kv_layout: KVLayout,
    implementation: Implementation | None,
    sequence_axis: str | None,
) -> Array:
    def on_shard(shard: Shard, index: PQIndex, key: Array) -> Array:
        span = Span.of(sequence_axis, index.codes.shape[-1])
        capacity = span.capacity if span else index.codes.shape[-1]
        lengths = jnp.clip(index.lengths, 0, capacity)
        keys = kmeans.training_set(key, lengths, config, kv_layout, ahead, span)
        if config.metric == "ip":  # distances are to the centroids as they were trained
            keys = keys._replace(phi=index.phi)
        errors = kmeans.first_step_errors(keys, index.codebooks, config, kv_layout, implementation)
        of_rows = (jnp.sum(x, axis=1) for x in errors)
        return kmeans.gain(*map(shard.sum_over_heads, of_rows))

    key = in_rows(key, page_table, kv_layout, layer, index.codes.shape[-1])
    index, key = layer_of((index, key), layer)
    return by_shards(on_shard, index=(None, index), key=(key_letters(kv_layout), key))


@functools.partial(
    backend.jit, static_argnames=("config", "kv_layout", "implementation", "sequence_axis")
)
def _append(
    index: PQIndex,
    key_new: Array,
    value: Array | None,
    counts: Array | None,
    layer: Array | None,
    *,
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: Implementation | None,
    sequence_axis: str | None,
) -> PQIndex:
    def on_shard(shard: Shard, index, key_new, value, counts, layer) -> PQIndex:
        del shard
        return _appended(
            index, key_new, value, counts, config, kv_layout, implementation, layer, sequence_axis
        )

    return by_shards(
        on_shard,
        index=(None, index),
        key_new=(key_letters(kv_layout), key_new),
        value=(key_letters(kv_layout, head="H'"), value),
        counts=("B", counts),
        layer=("", layer),
    )


def _appended(
    index: PQIndex,
    key_new: Array,
    value: Array | None,
    counts: Array | None,
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: Implementation | None,
    layer: Array | None = None,
    sequence_axis: str | None = None,
) -> PQIndex:
    step = Step.of(index, config, T=key_new.shape[token_axis(kv_layout)], kv_layout=kv_layout)

    def xla(key_new, value, index, counts, layer):
        before, span = layer_of(index.lengths, layer), Span.of(sequence_axis, step.S)
        capacity = span.capacity if span else step.S
        room, lengths = reference.make_room(before, counts, step.T, capacity)
        return reference.append_tokens(
            key_new, index, room, lengths, config, kv_layout, layer, value, span
        )

    def triton(key_new, value, index, counts, layer):
        span = Span.of(sequence_axis, step.S)
        return pipeline.launch_append(step, key_new, index, counts, layer, value, span)

    arguments = key_new, value, index, counts, layer
    return backend.dispatch(xla, triton, *arguments, implementation=implementation)
