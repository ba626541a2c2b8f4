"""decode_attention: a whole attention layer's decode step, and the life of its cache."""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import SingleDeviceSharding
from jaxtyping import Bool, Float, Int32

from jax_indexer import _arguments, reference
from jax_indexer.attend import logits_of
from jax_indexer.config import (
    Implementation,
    IndexerConfig,
    Selector,
    default_selector,
    float_dtype,
)
from jax_indexer.index import build_index, check_training, empty_index, rebuild
from jax_indexer.kernels import backend, pipeline
from jax_indexer.kernels.chunks import put
from jax_indexer.kernels.step import Step
from jax_indexer.layout import KVLayout, cache_letters, key_letters, token_axis
from jax_indexer.memory import moved_to_device, moved_to_host, not_mapped
from jax_indexer.pages import has_pages, page_size_of, write_pages
from jax_indexer.recent import empty_recent, kept_size, write_recent
from jax_indexer.reference import Caches, Logits
from jax_indexer.rope import COPIES, Rope, check_look_ahead
from jax_indexer.sharding import Shard, by_shards
from jax_indexer.state import DecodeCache, PQIndex, Recent, Span, layer_of


def decode_attention(
    query: Float[Array, "B T N H"],
    key_new: Float[Array, "B _ _ H"],
    value_new: Float[Array, "B _ _ H'"],
    cache: DecodeCache,
    config: IndexerConfig,
    *,
    counts: Int32[Array, "B"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    scale: float | Array | None = None,
    logits_soft_cap: float | Array | None = None,
    implementation: Implementation | None = None,
    selector: Selector | None = None,
    kv_layout: KVLayout = "BSKH",
    sequence_axis: str | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
) -> tuple[Float[Array, "B T N H'"], DecodeCache]:
    """A whole attention layer of a decode step.

    Each row's new keys and values are written at its length, their codes appended, tokens selected
    for its queries and attended to. A row takes all of its new tokens or none: one that would pass
    the capacity keeps its cache, and its unchanged length is the report.

    With `config.rerank` more candidates are found by score, and the best of them by their true keys
    attended to; with `config.estimate_rest` the others are estimated instead of dropped. Both bring
    the output closer to full attention at the same budget.

    Args:
      query: float32, bfloat16 or float16, the step's query tokens.
      key_new: [B, T, K, H] ("BSKH") or [B, K, T, H] ("BKSH"), their keys, in the cache's dtype.
      value_new: likewise, their values, with the head dimension H' of the cache's values.
      cache: before the step; donate it, or carry it through a scan, to have it updated in place.
      config: what the index was built with.
      counts: int32[B], how many of the T tokens each row takes, as in `indexer_next`; the output of
        query tokens that are padding is 0. None for T.
      layer: which layer of the cache, clipped to those there are, where its arrays have an axis of
        layers in front; None where they have none.
      scale: of the logits; None for H**-0.5.
      logits_soft_cap: logits become cap * tanh(logit / cap); None for as they are.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.
      selector: as in `select`.
      kv_layout: order of the token and head axes of new and cached keys and values.
      sequence_axis: inside a `shard_map`, the axis of its mesh that S is split over, None where it
        is whole. New tokens are the same on all devices along it; those that hold their positions
        keep them. Exchanges what `select` does, and outputs: one `all_gather` of 4 * (H' + 1) bytes
        a device and query. All devices along it return the same bits.
      page_table: int32[B, pages] for a cache in pages, as `sparse_attention` takes it; a row that
        lacks a page for one of its new tokens takes none. Pages that are written belong to one row,
        which is the caller's duty; others may be shared, as those of a common prefix. None for a
        cache in rows.

    Returns:
      [B, T, N, H'] in the query's dtype, computed in float32, and the cache after the step. No
      gradients flow through it: `sparse_attention` is for that.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype, before anything is updated.
      NotImplementedError: for an implementation or a selector that is not there, for `rerank`,
        `estimate_rest`, a page table or a cache in host memory with `sequence_axis`, for pages in
        host memory, and for more tokens than a step takes into a cache in host memory.

    Source: CONTRACT.md, section 4.
    """
    _arguments.check_decode(
        query,
        key_new,
        value_new,
        cache,
        config,
        counts,
        layer,
        kv_layout,
        implementation,
        selector,
        sequence_axis,
        page_table,
    )
    return _decode(
        query,
        key_new,
        value_new,
        cache,
        counts,
        logits_of(scale, logits_soft_cap, query.shape[3]),
        _arguments.check_layer(layer),
        page_table,
        config=config,
        implementation=implementation,
        selector=selector,
        kv_layout=kv_layout,
        sequence_axis=sequence_axis,
    )


@functools.partial(
    backend.jit,
    static_argnames=("config", "implementation", "selector", "kv_layout", "sequence_axis"),
)
def _decode(
    query: Array,
    key_new: Array,
    value_new: Array,
    cache: DecodeCache,
    counts: Array | None,
    logits: Logits,
    layer: Array | None,
    page_table: Array | None,
    *,
    config: IndexerConfig,
    implementation: Implementation | None,
    selector: Selector | None,
    kv_layout: KVLayout,
    sequence_axis: str | None,
) -> tuple[Array, DecodeCache]:
    def on_shard(
        shard: Shard,
        query,
        key_new,
        value_new,
        key,
        value,
        index,
        recent,
        counts,
        scale,
        soft_cap,
        layer,
        page_table,
    ) -> tuple[Array, Array, Array, PQIndex, Recent | None]:
        del shard
        T, N = query.shape[1:3]
        size = None if page_table is None else page_size_of(key, kv_layout)
        step = Step.of(index, config, T=T, N=N, kv_layout=kv_layout, page_size=size)
        chosen = selector or default_selector(config.pool, step.S, T, config.has_pool)

        def xla(query, new, caches, index, recent, counts, logits, layer, page_table):
            before, span = layer_of(index.lengths, layer), Span.of(sequence_axis, step.S)
            arguments = index, counts, logits, config, kv_layout, layer, span, page_table
            out, written, index = reference.decode(query, new, moved_to_device(caches), *arguments)
            if recent is None:
                return out, written, index, None
            room, _ = reference.make_room(before, counts, T, step.S)
            recent = write_recent(recent, new, room, config, kv_layout, layer)
            return out, moved_to_host(written), index, recent

        def triton(query, new, caches, index, recent, counts, logits, layer, page_table):
            places = layer, Span.of(sequence_axis, step.S), page_table
            return pipeline.launch_decode(
                step, query, new, caches, index, recent, counts, logits, chosen, *places
            )

        new, caches = Caches(key_new, value_new), Caches(key, value)
        of_state = counts, Logits(scale, soft_cap), layer, page_table
        arguments = query, new, caches, index, recent, *of_state
        if recent is not None:
            arguments = not_mapped(arguments, "cache")
        out, caches, index, recent = backend.dispatch(
            xla, triton, *arguments, implementation=implementation
        )
        return out, *caches, index, recent

    in_pages = page_table is not None
    of_cache = cache_letters(kv_layout, in_pages), cache_letters(kv_layout, in_pages, "H'")
    logits = jax.tree.map(lambda x: x.astype(jnp.float32), logits)
    out, key, value, index, recent = by_shards(
        on_shard,
        results=("B T N H'", *of_cache, None, None),
        rows_share=in_pages,
        query=("B T N H", query),
        key_new=(key_letters(kv_layout, "T"), key_new),
        value_new=(key_letters(kv_layout, "T", "H'"), value_new),
        key=(of_cache[0], cache.key),
        value=(of_cache[1], cache.value),
        index=(None, cache.index),
        recent=(None, cache.recent),
        counts=("B", counts),
        scale=("", logits.scale),
        logits_soft_cap=("", logits.soft_cap),
        layer=("", layer),
        page_table=("B pages", page_table),
    )
    return out, DecodeCache(key, value, index, recent)


def empty_cache(
    config: IndexerConfig,
    batch: int,
    capacity: int,
    kv_heads: int,
    head_dim: int,
    *,
    value_head_dim: int | None = None,
    dtype: Any = jnp.bfloat16,
    layers: int | None = None,
    kv_layout: KVLayout = "BSKH",
    memory_kind: str | None = None,
    kept_rows: int | None = None,
    num_pages: int | None = None,
    page_size: int | None = None,
) -> DecodeCache:
    """A cache without tokens, with all the state that the config needs; `prefill` puts prompts in.

    Its codebooks are zeros: tokens may be appended, but `prefill` or `rebuild` must train before
    their scores mean anything.

    A view that NumPy has of a cache in host memory (`np.asarray`) keeps it from being donated:
    compare copies, of `jax.device_put(x, jax.memory.Space.Device)`. Where tokens are split over
    devices a cache begins empty inside of the `shard_map`, as a `DecodeCache` of zeros with
    `build_index` of lengths that are 0 and this `sequence_axis`.

    Args:
      config: static parameters.
      batch: B, rows.
      capacity: S, tokens of a row.
      kv_heads: K.
      head_dim: H.
      value_head_dim: H', of the values; None for H.
      dtype: of keys and values: float32, bfloat16 or float16.
      layers: how many layers share the arrays, along an axis in front of all of them; None for one
        layer without such an axis.
      kv_layout: order of the token and head axes of keys and values.
      memory_kind: "pinned_host" for keys and values in host memory, which kernels read and write
        over the bus; what of them is used most is on the device too. Call it outside of `jit`
        then. None for the device.
      kept_rows: with it, how many tokens' keys and values of each kv head stay on the device once
        they were listed; None for 16 times the `heavy_size` (`rerank` counted) of a query head.
      num_pages, page_size: of keys and values in pages, which go by a page table; None for rows.

    Returns:
      A DecodeCache.

    Raises:
      ValueError: for a size or dtype that is none, and for a kind of memory that is not there.
      NotImplementedError: for pages in host memory.

    Source: CONTRACT.md, section 4.
    """
    _arguments.check_config(config)
    _arguments.check_choice("kv_layout", kv_layout, get_args(KVLayout))
    sizes = _arguments.check_sizes(
        batch=batch,
        capacity=capacity,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=head_dim if value_head_dim is None else value_head_dim,
        layers=1 if layers is None else layers,
        kept_rows=kept_size(config) if kept_rows is None else kept_rows,
        num_pages=batch if num_pages is None else num_pages,
        page_size=capacity if page_size is None else page_size,
    )
    _arguments.check_memory_kind(memory_kind)
    if memory_kind is not None and (num_pages, page_size) != (None, None):
        raise NotImplementedError(
            f"num_pages, page_size: with memory_kind={memory_kind!r} kernels need to write and "
            "keep rows by their pages, which is not there yet; leave them out"
        )
    if memory_kind is None and kept_rows is not None:
        raise ValueError(
            f"kept_rows: expected None for a cache on the device, got {kept_rows!r}; leave it out, "
            'or use memory_kind="pinned_host"'
        )
    kept = min(sizes["kept_rows"], sizes["capacity"])
    if (num_pages is None) != (page_size is None):
        raise ValueError(
            f"num_pages, page_size: expected both or neither, got {num_pages} and {page_size}; "
            "pages have both"
        )
    if not (page_size is None or _arguments.is_power_of_2(sizes["page_size"])):
        raise ValueError(f"page_size: expected a power of two, got {page_size}; use 16 to 256")
    dtype = float_dtype("dtype", dtype, "use jnp.bfloat16")
    B, S, K, H, of_value = (
        sizes[name] for name in ("batch", "capacity", "kv_heads", "head_dim", "value_head_dim")
    )
    if H % config.num_subspaces:
        raise ValueError(
            f"head_dim: expected a number divisible by num_subspaces={config.num_subspaces}, "
            f"got {H}; choose num_subspaces among its divisors"
        )

    def cache(head_dim: int) -> Array:
        rows, tokens = sizes["num_pages"], sizes["page_size"]
        shape = (rows, tokens, K) if kv_layout == "BSKH" else (rows, K, tokens)
        return jnp.zeros((*shape, head_dim), dtype)

    def stacked(one: Any) -> Any:
        if layers is None:
            return one
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), one)

    def empty() -> DecodeCache:
        index = empty_index(config, B, S, K, H, of_value)
        return stacked(DecodeCache(cache(H), cache(of_value), index))

    def empty_on_device() -> tuple[PQIndex, Recent]:
        index = empty_index(config, B, S, K, H, of_value)
        return stacked((index, empty_recent(B, S, K, H, of_value, config, dtype, kept)))

    if memory_kind is None:
        return jax.jit(empty)()
    shapes = jax.eval_shape(empty)
    # Zeros that are made on the device would need all of its memory.
    on_host = SingleDeviceSharding(jax.devices()[0], memory_kind=memory_kind)
    key, value = (
        jax.device_put(np.zeros(x.shape, x.dtype), on_host) for x in (shapes.key, shapes.value)
    )
    return DecodeCache(key, value, *jax.jit(empty_on_device)())


def prefill(
    key: Float[Array, "B _ _ H"],
    value: Float[Array, "B _ _ H'"],
    lengths: Int32[Array, "B"],
    config: IndexerConfig,
    *,
    cache: DecodeCache | None = None,
    rows: Bool[Array, "B"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    seed: int = 0,
    rope: Rope | None = None,
    look_ahead: int | None = None,
    copies: int = COPIES,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
) -> DecodeCache:
    """Puts prompts into a cache: their keys and values, codebooks trained on them, their codes.

    To decode about as if with full attention: `IndexerConfig(cells=True, rerank=8,
    estimate_rest="codes")`, with `grouping="strided"` where RoPE's pairs are interleaved, and
    `look_ahead` for the tokens that follow, with 3 copies where these are about as many as a prompt
    has and 1 where they are far fewer. `rerank=16` comes closer; the defaults are the fastest.

    Args:
      key: [B, s, K, H] ("BSKH") or [B, K, s, H] ("BKSH"), keys of prompts of up to s tokens, in the
        cache's dtype; what lies past a row's length is garbage.
      value: likewise, their values.
      lengths: int32[B], tokens of each row's prompt; clipped to 0..s.
      config: static parameters.
      cache: what the prompts go into, of a capacity of s or more; donate it to have it updated in
        place. None to make `key` and `value` themselves the cache, with room for s tokens.
      rows: bool[B], the rows that get a prompt; the others keep what they have. None for all.
      layer: which layer of the cache, clipped to those there are, where its arrays have an axis of
        layers in front; None where they have none.
      seed: of the random numbers of training. With a cache in host memory `config.train_tokens`
        says how many keys that is.
      rope, look_ahead, copies: as in `build_index`: how the keys were turned, and how many tokens
        are expected to be decoded, for codebooks that fit these too.
      kv_layout: order of the token and head axes of keys and values.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.
      page_table: of a cache in pages, as `decode_attention` takes it: the prompts go there, and a
        row without pages for all of its prompt keeps what it has. Training reads a copy in rows.

    Returns:
      A DecodeCache, with the index that `build_index` makes of each row that got a prompt.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype, before anything is updated; without
        `cache` also for more kv heads than tokens, as `build_index` does.
      NotImplementedError: for an implementation that is not there.

    Source: CONTRACT.md, section 4.
    """
    of_cache = cache, rows, layer, kv_layout, page_table
    sizes = _arguments.check_prefill(key, value, lengths, config, *of_cache)
    check_look_ahead(rope, look_ahead, copies, sizes["H"])
    options = {"seed": seed, "kv_layout": kv_layout, "implementation": implementation}
    options |= {"rope": rope, "look_ahead": look_ahead, "copies": copies}
    if cache is None:
        of_value = value if config.estimate_rest else None
        index = build_index(key, lengths, config, value=of_value, **options)
        return DecodeCache(key, value, index)
    _arguments.check_seed(seed)
    check_training(implementation, config, sizes, key, cache)
    layer = _arguments.check_layer(layer)
    if cache.recent is not None:
        lengths = jnp.clip(lengths, 0, sizes["s"])
        rows = jnp.ones_like(lengths, bool) if rows is None else rows
        counts = jnp.where(rows, lengths, 0)
        of_chunk = {"kv_layout": kv_layout, "implementation": implementation}
        start = jnp.zeros_like(lengths)
        filled = _put_chunk(key, value, start, cache, counts, layer, config=config, **of_chunk)
        of_value = filled.value if config.estimate_rest else None
        grown = {"value": of_value, "lengths": lengths, "layer": layer}
        index = rebuild(filled.index, filled.key, config, rows, **grown, **options)
        return dataclasses.replace(filled, index=index)
    caches, prompt_lengths, prompt_rows = _put_prompts(
        Caches(cache.key, cache.value),
        Caches(key, value),
        lengths,
        rows,
        layer,
        page_table,
        kv_layout=kv_layout,
    )
    index = rebuild(
        cache.index,
        caches.key,
        config,
        prompt_rows,
        value=caches.value if config.estimate_rest else None,
        lengths=prompt_lengths,
        layer=layer,
        page_table=page_table,
        **options,
    )
    return DecodeCache(caches.key, caches.value, index)


def prefill_chunk(
    key: Float[Array, "B _ _ H"],
    value: Float[Array, "B _ _ H'"],
    start: Int32[Array, "B"],
    cache: DecodeCache,
    config: IndexerConfig,
    *,
    counts: Int32[Array, "B"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
) -> DecodeCache:
    """Puts a part of prompts into a cache, whose index knows nothing of it yet.

    For prompts that are never whole on the device: call it for one chunk after another, in the
    order of their positions, then `rebuild` with the cache's keys and the lengths of the prompts.

    Args:
      key: [B, s, K, H] ("BSKH") or [B, K, s, H] ("BKSH"), keys of s tokens, in the cache's dtype.
      value: likewise, their values.
      start: int32[B], the position of each row's first one; clipped to 0..S.
      cache: what they go into, in rows; donate it to have it updated in place. Into pages whole
        prompts go, by `prefill` with a page table.
      config: what the cache was made with.
      counts: int32[B], how many of the s tokens each row takes, clipped to 0..s; None for s. A row
        that would pass the capacity takes none.
      layer: which layer of the cache, clipped to those there are, where its arrays have an axis of
        layers in front; None where they have none.
      kv_layout: order of the token and head axes of keys and values.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.

    Returns:
      The cache with these tokens.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype, before anything is updated.
      NotImplementedError: for an implementation that is not there.

    Source: CONTRACT.md, section 4.
    """
    _arguments.check_chunk(
        key, value, start, cache, config, counts, layer, kv_layout, implementation
    )
    layer, of_chunk = _arguments.check_layer(layer), (key, value, start, cache, counts)
    options = {"kv_layout": kv_layout, "implementation": implementation}
    return _put_chunk(*of_chunk, layer, config=config, **options)


@functools.partial(backend.jit, static_argnames=("config", "kv_layout", "implementation"))
def _put_chunk(
    key: Array,
    value: Array,
    start: Array,
    cache: DecodeCache,
    counts: Array | None,
    layer: Array | None,
    *,
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: Implementation | None,
) -> DecodeCache:
    def on_shard(shard: Shard, key, value, start, counts, old_key, old_value, recent, layer):
        del shard
        new, caches = Caches(key, value), Caches(old_key, old_value)
        tokens = key.shape[token_axis(kv_layout)]
        capacity = old_key.shape[token_axis(kv_layout) - 4]
        room, _ = reference.make_room(start, counts, tokens, capacity)

        def xla(new, room, caches, recent, layer):
            axis = token_axis(kv_layout) - 4
            on_device = moved_to_device(caches)
            written = Caches(
                *(
                    reference.write_tokens(cache, x, room, cache.ndim + axis, layer)
                    for cache, x in zip(on_device, new, strict=True)
                )
            )
            if recent is None:
                return written, None
            recent = write_recent(recent, new, room, config, kv_layout, layer)
            return moved_to_host(written), recent

        def triton(new, room, caches, recent, layer):
            options = config, kv_layout, layer
            recent = None if recent is None else put(new, room, recent, *options)
            return put(new, room, caches, *options), recent

        arguments = new, room, caches, recent, layer
        if recent is not None:
            arguments = not_mapped(arguments, "cache")
        caches, recent = backend.dispatch(xla, triton, *arguments, implementation=implementation)
        return *caches, recent

    of_cache = key_letters(kv_layout), key_letters(kv_layout, head="H'")
    key, value, recent = by_shards(
        on_shard,
        results=(*of_cache, None),
        key=(key_letters(kv_layout, "s"), key),
        value=(key_letters(kv_layout, "s", "H'"), value),
        start=("B", start),
        counts=("B", counts),
        cached_key=(of_cache[0], cache.key),
        cached_value=(of_cache[1], cache.value),
        recent=(None, cache.recent),
        layer=("", layer),
    )
    return dataclasses.replace(cache, key=key, value=value, recent=recent)


@functools.partial(backend.jit, static_argnames=("kv_layout",))
def _put_prompts(
    caches: Caches,
    prompts: Caches,
    lengths: Array,
    rows: Array | None,
    layer: Array | None,
    page_table: Array | None,
    *,
    kv_layout: KVLayout,
) -> tuple[Caches, Array, Array]:
    """The caches with prompts at the start of some rows of a layer; clipped lengths, and rows."""
    lengths = jnp.clip(lengths, 0, prompts.key.shape[token_axis(kv_layout)])
    rows = jnp.ones_like(lengths, bool) if rows is None else rows

    if page_table is not None:
        size, tokens = page_size_of(caches.key, kv_layout), prompts.key.shape[token_axis(kv_layout)]
        start = jnp.zeros_like(lengths)
        rows &= has_pages(page_table, tokens, size)(start, lengths)
        of_pages = start, jnp.where(rows, lengths, 0), page_table, kv_layout, layer
        written = (write_pages(*x, *of_pages) for x in zip(caches, prompts, strict=True))
        return Caches(*written), lengths, rows

    def put(cache: Array, prompt: Array) -> Array:
        start = [jnp.int32(0)] * cache.ndim
        size = prompt.shape
        if layer is not None:
            start[0] = jnp.clip(layer, 0, cache.shape[0] - 1)
            size = (1, *size)
        old = lax.dynamic_slice(cache, start, size).reshape(prompt.shape)
        new = jnp.where(jnp.expand_dims(rows, (1, 2, 3)), prompt, old)
        return lax.dynamic_update_slice(cache, new.reshape(size), start)

    caches = Caches(put(caches.key, prompts.key), put(caches.value, prompts.value))
    return caches, lengths, rows
