"""select and indexer_next: which tokens each query head attends to."""

import functools

from jax import Array
from jaxtyping import Float, Int32

from jax_indexer import _arguments, reference
from jax_indexer.config import Implementation, IndexerConfig, Selector, default_selector
from jax_indexer.kernels import backend, pipeline
from jax_indexer.kernels.step import Step
from jax_indexer.layout import KVLayout, key_letters
from jax_indexer.sharding import Shard, by_shards
from jax_indexer.state import PQIndex, Selection, layer_of


def select(
    query: Float[Array, "B T N H"],
    index: PQIndex,
    config: IndexerConfig,
    *,
    counts: Int32[Array, "B"] | None = None,
    layer: int | Int32[Array, ""] | None = None,
    return_weights: bool = False,
    implementation: Implementation | None = None,
    selector: Selector | None = None,
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
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.
      selector: how the heavy tokens are found; all give the same list. "cells" needs
        `config.cells`. None: `jax_indexer.config.default_selector`, where it is Triton that runs.

    Returns:
      A Selection.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.
      NotImplementedError: for an implementation or a selector that is not there.

    Source: CONTRACT.md, section 3.
    """
    _arguments.check_select(
        query, index, config, counts, layer, return_weights, implementation, selector
    )
    return _select(
        query,
        index,
        counts,
        _arguments.check_layer(layer),
        config=config,
        return_weights=return_weights,
        implementation=implementation,
        selector=selector,
    )


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

    Returns:
      The Selection and the index after the step.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype, before anything is updated.
      NotImplementedError: for an implementation or a selector that is not there.

    Source: CONTRACT.md, section 4.
    """
    apart = "call append and select apart for other numbers"
    _arguments.check_step(query, key_new, kv_layout, apart)
    _arguments.check_append(index, key_new, config, value, counts, layer, kv_layout, implementation)
    _arguments.check_select(
        query, index, config, counts, layer, return_weights, implementation, selector
    )
    return _step(
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
    )


@functools.partial(
    backend.jit, static_argnames=("config", "return_weights", "implementation", "selector")
)
def _select(
    query: Array,
    index: PQIndex,
    counts: Array | None,
    layer: Array | None,
    *,
    config: IndexerConfig,
    return_weights: bool,
    implementation: Implementation | None,
    selector: Selector | None,
) -> Selection:
    weights_dtype = query.dtype if return_weights else None

    def on_shard(shard: Shard, query, index, counts, layer) -> Selection:
        del shard
        T, N = query.shape[1:3]
        step = Step.of(index, config, T=T, N=N, weights_dtype=weights_dtype)
        chosen = selector or default_selector(config, step.S, T)

        def xla(query, index, counts, layer):
            index = layer_of(index, layer)
            return reference.select_tokens(query, index, config, counts, weights_dtype)

        def triton(query, index, counts, layer):
            return pipeline.launch_select(step, query, index, counts, chosen, layer)

        arguments = query, index, counts, layer
        return backend.dispatch(xla, triton, *arguments, implementation=implementation)

    return by_shards(
        on_shard,
        query=("B T N H", query),
        index=(None, index),
        counts=("B", counts),
        layer=("", layer),
    )


@functools.partial(
    backend.jit,
    static_argnames=("config", "return_weights", "implementation", "selector", "kv_layout"),
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
            before = layer_of(index.lengths, layer)
            room, lengths = reference.make_room(before, counts, T, step.S)
            taken = None if counts is None else room.taken
            index = reference.append_tokens(
                key_new, index, room, lengths, config, kv_layout, layer, value
            )
            one = layer_of(index, layer)
            return reference.select_tokens(query, one, config, taken, weights_dtype), index

        def triton(query, key_new, value, index, counts, layer):
            return pipeline.launch_step(step, query, key_new, index, counts, chosen, layer, value)

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
