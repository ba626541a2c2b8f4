"""select and indexer_next: which tokens each query head attends to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from jax_indexer import _arguments, reference
from jax_indexer.attend import logits_of
from jax_indexer.config import Implementation, IndexerConfig, Selector, default_selector
from jax_indexer.kernels import backend, pipeline
from jax_indexer.kernels.step import Step
from jax_indexer.layout import KVLayout, key_letters
from jax_indexer.reference import Logits
from jax_indexer.sharding import Shard, by_shards
from jax_indexer.state import PQIndex, Selection, Span, layer_of


def select(
    query: Float[Array, "B T N H"],
    index: PQIndex,
    config: IndexerConfig,
    *,
    counts: Int32[Array, "B"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    return_weights: bool = False,
    return_rest: bool = False,
    scale: float | Array | None = None,
    logits_soft_cap: float | Array | None = None,
    implementation: Implementation | None = None,
    selector: Selector | None = None,
    sequence_axis: str | None = None,
) -> Selection:
    """Selects for every query head the sink, heavy and window tokens to attend to.

    Args:
      query: float32, bfloat16 or float16, the step's query tokens; without `counts` the last one
        sees all `index.lengths` tokens, the one before it one less, and so on.
      index: the product-quantized keys, those of the step's own tokens included.
      config: what the index was built with.
      counts: how many tokens of the step each row has taken, clipped to 0..T: its first query
        tokens belong to them, of which the last sees all tokens; the others are padding, with
        empty lists. None for T.
      layer: which layer of the index, clipped to those there are, where its arrays have an axis of
        layers in front; None where they have none.
      return_weights: whether to write the dense weights too.
      return_rest: whether to estimate what is not listed, for `sparse_attention(rest=)`; it takes
        a config with `estimate_rest`.
      scale, logits_soft_cap: with `return_rest` those of the attention; None for H**-0.5, and for
        logits as they are.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.
      selector: how the heavy tokens are found; all give the same list. "cells" needs
        `config.cells`. None: `jax_indexer.config.default_selector`, where it is Triton that runs.
      sequence_axis: inside a `shard_map`, the axis of its mesh that S is split over, None where it
        is whole. Each device then lists those tokens of the list of one device that it holds, by
        positions that count from its first, i * S on the i-th: what `sparse_attention` there takes.
        They find the cut by one `all_gather` of 4 * min(heavy_size, S) bytes a device and query.

    Returns:
      A Selection.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.
      NotImplementedError: for an implementation or a selector that is not there.

    Source: CONTRACT.md, section 3.
    """
    _arguments.check_select(
        query,
        index,
        config,
        counts,
        layer,
        return_weights,
        implementation,
        selector,
        sequence_axis,
    )
    _arguments.check_return_rest(return_rest, config, scale, logits_soft_cap)
    selection = _select(
        query,
        index,
        counts,
        logits_of(scale, logits_soft_cap, query.shape[3]) if return_rest else None,
        _arguments.check_layer(layer),
        config=config,
        return_weights=return_weights,
        implementation=implementation,
        selector=selector,
        sequence_axis=sequence_axis,
    )
    return dataclasses.replace(selection, sequence_axis=sequence_axis)


def indexer_next(
    query: Float[Array, "B T N H"],
    key_new: Float[Array, "B _ _ H"],
    index: PQIndex,
    config: IndexerConfig,
    *,
    value: Float[Array, "B _ _ H'"] | None = None,
    counts: Int32[Array, "B"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    return_weights: bool = False,
    implementation: Implementation | None = None,
    selector: Selector | None = None,
    kv_layout: KVLayout = "BSKH",
    sequence_axis: str | None = None,
) -> tuple[Selection, PQIndex]:
    """A whole decode step: appends the step's keys, then selects for its queries.

    Args:
      query: the step's query tokens.
      key_new: [B, T, K, H] ("BSKH") or [B, K, T, H] ("BKSH"), their keys.
      index: the index before the step; donate it to have it updated in place.
      config: what the index was built with.
      value: with `config.estimate_rest` the cache of values, as in `append`.
      counts: how many of the T tokens each row takes, as in `append`: the first ones, with the
        query tokens of the same numbers. The others are padding, and so are all of a row that
        would pass the capacity. None for T.
      layer: as in `select`.
      return_weights: as in `select`.
      implementation: as in `select`, of both.
      selector: as in `select`.
      kv_layout: order of the token and head axes of `key_new` and `value`.
      sequence_axis: as in `select`, of both; appending exchanges nothing.

    Returns:
      The Selection and the index after the step.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype, before anything is updated.
      NotImplementedError: for an implementation or a selector that is not there.

    Source: CONTRACT.md, section 4.
    """
    apart = "call append and select apart for other numbers"
    _arguments.check_step(query, key_new, kv_layout, apart)
    by_axis = {"sequence_axis": sequence_axis}
    _arguments.check_append(
        index, key_new, config, value, counts, layer, kv_layout, implementation, **by_axis
    )
    _arguments.check_select(
        query, index, config, counts, layer, return_weights, implementation, selector, **by_axis
    )
    selection, index = _step(
        query,
        key_new,
        value,
        index,
        counts,
        _arguments.check_layer(layer),
        config=config,
        return_weights=return_weights,
        implementation=implementation,
        selector=selector,
        kv_layout=kv_layout,
        sequence_axis=sequence_axis,
    )
    return dataclasses.replace(selection, sequence_axis=sequence_axis), index


@functools.partial(
    backend.jit,
    static_argnames=("config", "return_weights", "implementation", "selector", "sequence_axis"),
)
def _select(
    query: Array,
    index: PQIndex,
    counts: Array | None,
    rest_by: Logits | None,
    layer: Array | None,
    *,
    config: IndexerConfig,
    return_weights: bool,
    implementation: Implementation | None,
    selector: Selector | None,
    sequence_axis: str | None,
) -> Selection:
    weights_dtype = query.dtype if return_weights else None
    scale = soft_cap = None
    if rest_by is not None:
        config = dataclasses.replace(config, rerank=1)
        scale, soft_cap = jax.tree.map(lambda x: x.astype(jnp.float32), tuple(rest_by))

    def on_shard(shard: Shard, query, index, counts, scale, soft_cap, layer) -> Selection:
        del shard
        rest_by = None if scale is None else Logits(scale, soft_cap)
        T, N = query.shape[1:3]
        step = Step.of(index, config, T=T, N=N, weights_dtype=weights_dtype)
        chosen = selector or default_selector(config, step.S, T, goes_on=rest_by is not None)

        def xla(query, index, counts, layer, rest_by):
            index, span = layer_of(index, layer), Span.of(sequence_axis, step.S)
            return reference.select_tokens(
                query, index, config, counts, weights_dtype, span, rest_by
            )

        def triton(query, index, counts, layer, rest_by):
            span = Span.of(sequence_axis, step.S)
            return pipeline.launch_select(step, query, index, counts, chosen, layer, span, rest_by)

        arguments = query, index, counts, layer, rest_by
        return backend.dispatch(xla, triton, *arguments, implementation=implementation)

    return by_shards(
        on_shard,
        query=("B T N H", query),
        index=(None, index),
        counts=("B", counts),
        scale=("", scale),
        logits_soft_cap=("", soft_cap),
        layer=("", layer),
    )


@functools.partial(
    backend.jit,
    static_argnames=(
        "config",
        "return_weights",
        "implementation",
        "selector",
        "kv_layout",
        "sequence_axis",
    ),
)
def _step(
    query: Array,
    key_new: Array,
    value: Array | None,
    index: PQIndex,
    counts: Array | None,
    layer: Array | None,
    *,
    config: IndexerConfig,
    return_weights: bool,
    implementation: Implementation | None,
    selector: Selector | None,
    kv_layout: KVLayout,
    sequence_axis: str | None,
) -> tuple[Selection, PQIndex]:
    weights_dtype = query.dtype if return_weights else None

    def on_shard(
        shard: Shard, query, key_new, value, index, counts, layer
    ) -> tuple[Selection, PQIndex]:
        del shard
        T, N = query.shape[1:3]
        step = Step.of(index, config, T=T, N=N, kv_layout=kv_layout, weights_dtype=weights_dtype)
        chosen = selector or default_selector(config, step.S, T)

        def xla(query, key_new, value, index, counts, layer):
            before, span = layer_of(index.lengths, layer), Span.of(sequence_axis, step.S)
            capacity = span.capacity if span else step.S
            room, lengths = reference.make_room(before, counts, T, capacity)
            taken = None if counts is None else room.taken
            index = reference.append_tokens(
                key_new, index, room, lengths, config, kv_layout, layer, value, span
            )
            one = layer_of(index, layer)
            selection = reference.select_tokens(query, one, config, taken, weights_dtype, span)
            return selection, index

        def triton(query, key_new, value, index, counts, layer):
            span = Span.of(sequence_axis, step.S)
            return pipeline.launch_step(
                step, query, key_new, index, counts, chosen, layer, value, span
            )

        arguments = query, key_new, value, index, counts, layer
        return backend.dispatch(xla, triton, *arguments, implementation=implementation)

    return by_shards(
        on_shard,
        query=("B T N H", query),
        key_new=(key_letters(kv_layout, "T"), key_new),
        value=(key_letters(kv_layout, head="H'"), value),
        index=(None, index),
        counts=("B", counts),
        layer=("", layer),
    )
