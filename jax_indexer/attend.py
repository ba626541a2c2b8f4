"""sparse_attention: the consumer of the lists."""

import contextlib
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32

from jax_indexer import _arguments, reference
from jax_indexer.config import Implementation, IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.kernels.attend import Entries, launch_listed
from jax_indexer.layout import KVLayout, cache_letters
from jax_indexer.memory import is_on_host, moved_to_device, not_mapped
from jax_indexer.pages import in_rows, page_and_slot
from jax_indexer.reference import Caches, Logits
from jax_indexer.sharding import by_shards
from jax_indexer.state import Rest, Selection


def sparse_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B _ _ H"],
    value: Float[Array, "B _ _ H'"],
    selection: Selection,
    *,
    config: IndexerConfig | None = None,
    scale: float | Array | None = None,
    logits_soft_cap: float | Array | None = None,
    return_lse: bool = False,
    rest: Rest | None = None,
    layer: int | Int32[Array, ""] | None = None,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
    sequence_axis: str | None = None,
    page_table: Int32[Array, "B pages"] | None = None,
) -> Float[Array, "B T N H'"] | tuple[Float[Array, "B T N H'"], Float[Array, "B T N"]]:
    """Softmax attention of every query head over the tokens listed for it.

    Args:
      query: [B, T, N, H], float32, bfloat16 or float16.
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"), the cache; with `layer` behind an axis
        of layers.
      value: like `key`, but with a head dimension H' of its own. Both may be in host memory: lists
        are then read over the bus.
      selection: what `select` returned for an index of the cache's capacity S; only its indices
        are read.
      config: what `select` made the selection with. "triton" then reads sink and window, which
        query heads of a kv head have in common, once for up to 16 of them, by the list of one.
        None for lists of any other kind.
      scale: of the logits; None for H**-0.5.
      logits_soft_cap: logits become cap * tanh(logit / cap); None for as they are.
      return_lse: whether to return the log of the sum of exponentials too.
      rest: `selection.rest`, of a selection with `return_rest`, scale and cap as here: what is not
        listed, estimated, is added. It takes the config too.
      layer: which layer of the caches, clipped to those there are; None for caches of one.
      kv_layout: order of the token and head axes of `key` and `value`.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.
      sequence_axis: inside a `shard_map`, the axis of its mesh that S is split over, None where it
        is whole. The selection is that of `select` on the device; outputs are merged by one
        `all_gather` of 4 * (H' + 1) bytes a device and query, the same bits on all devices.
        `config` is not used: what query heads have in common lies elsewhere on each device.
      page_table: int32[B, pages] for caches in pages, [num_pages, page_size, K, H] or head-major:
        page i of a row has its positions from i * page_size on, page_size a power of two. -1 for a
        page that is absent, which reads as zeros; one beyond those there are is taken for the last.
        Rows may share pages. None for caches in rows.

    Returns:
      [B, T, N, H'] in the query's dtype, computed in float32; zeros where nothing is listed. With
      `return_lse` also float32[B, T, N], the log of the sum of the logits' exponentials, -inf where
      nothing is listed, by which attention over parts of a context can be merged. Gradients (of
      reverse mode; with "xla" forward mode too) flow to query, key, value, scale and cap; those of
      tokens that are not listed are 0, and a rest and its correction count as constants.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype, and on meshes of Explicit axes for
        caches that are split by tokens.
      NotImplementedError: for an implementation that is not there, and for a page table with
        `sequence_axis`.

    Source: CONTRACT.md, section 4.
    """
    in_pages = _arguments.pages_fix(key)
    sizes = _arguments.Sizes(stacked=layer is not None, if_in_pages=in_pages)
    of_cache = {"may_be_on_host": True, "page_table": page_table}
    _arguments.check_key("key", key, "S", kv_layout, sizes, **of_cache)
    _arguments.check_array("query", query, _arguments.QUERY, sizes)
    _arguments.check_groups(sizes)
    _arguments.check_page_table(page_table, sizes)
    _arguments.check_whole_pages(page_table, sequence_axis, key)
    _arguments.check_selection(selection, config, sizes, page_table, sequence_axis)
    _arguments.check_key("value", value, "S", kv_layout, sizes, head="H'", **of_cache)
    _arguments.check_same_memory(("key", "value"), key, value)
    _arguments.check_choice("return_lse", return_lse, (True, False))
    _arguments.check_rest(rest, config, sizes)
    _arguments.check_implementation(implementation, query, key, value)
    # Who asks for the logarithm may merge parts on his own.
    parts = {} if return_lse and sequence_axis is None else {"key": key, "value": value}
    without = {} if rest is None else {"rest": "sums of what devices left out"}
    _arguments.check_sequence_axis(sequence_axis, {"query": query}, parts, without=without)
    found = _attend(
        query,
        key,
        value,
        selection.indices,
        logits_of(scale, logits_soft_cap, sizes["H"]),
        rest,
        _arguments.check_layer(layer),
        page_table,
        own=None if config is None or sequence_axis is not None else Entries.of(config),
        kv_layout=kv_layout,
        implementation=implementation,
        dtype=query.dtype if sequence_axis is None else np.dtype(np.float32),
    )
    if sequence_axis is not None:
        found = reference.merge_devices(found, query.dtype, sequence_axis)
    return tuple(found) if return_lse else found.out


def logits_of(scale: Any, logits_soft_cap: Any, head_dimension: int) -> Logits:
    """How logits are made, on the device; ValueError for what are no numbers."""
    scale = head_dimension**-0.5 if scale is None else _number("scale", scale)
    cap = None if logits_soft_cap is None else _number("logits_soft_cap", logits_soft_cap)
    if isinstance(cap, float) and not 0 < cap < math.inf:
        raise ValueError(f"logits_soft_cap: expected a positive number, got {cap}; or use None")

    def on_device(x: Any) -> Array:
        return jax.device_put(x if isinstance(x, jax.Array) else np.float32(x))

    return Logits(on_device(scale), None if cap is None else on_device(cap))


def _number(name: str, value: Any) -> Any:
    """A float or a floating array; ValueError for anything else."""
    if isinstance(value, (jax.Array, np.ndarray)):
        if not value.ndim and jnp.issubdtype(value.dtype, jnp.floating):
            return value
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    raise ValueError(f"{name}: expected a real number, got {value!r}; pass a float or None")


@functools.partial(backend.jit, static_argnames=("own", "kv_layout", "implementation", "dtype"))
def _attend(
    query: Array,
    key: Array,
    value: Array,
    indices: Array,
    logits: Logits,
    rest: Rest | None,
    layer: Array | None,
    page_table: Array | None,
    *,
    own: Entries | None,
    kv_layout: KVLayout,
    implementation: Implementation | None,
    dtype: np.dtype,
) -> reference.Attention:
    if is_on_host(key):
        key, value = not_mapped((key, value), "key")

    def xla(query, key, value, indices, logits, rest, layer, page_table):
        key, value = moved_to_device((key, value))
        key, value = (in_rows(x, page_table, kv_layout, layer) for x in (key, value))
        entry = np.arange(indices.shape[-1])
        heavy = None if own is None else (entry >= own.first) & (entry < own.last)
        return reference.attend(
            query, key, value, indices, logits, kv_layout, layer, dtype, rest, heavy
        )

    def triton(query, key, value, indices, logits, rest, layer, page_table):
        caches = Caches(key, value)
        options = {"own": own, "rest": rest, "dtype": dtype, "page_table": page_table}
        ended = launch_listed(query, caches, indices, logits, layer, kv_layout, **options)
        return ended.output

    def on_shards(function, has_gradients):
        def on_shard(shard, query, key, value, indices, scale, soft_cap, rest, layer, page_table):
            del shard
            logits = Logits(scale, soft_cap)
            return tuple(function(query, key, value, indices, logits, rest, layer, page_table))

        def call(query, key, value, logits, indices, rest, layer, page_table):
            logits = jax.tree.map(lambda x: x.astype(jnp.float32), logits)
            found = by_shards(
                on_shard,
                has_gradients=has_gradients,
                results=("B T N H'", "B T N"),
                rows_share=page_table is not None,
                query=("B T N H", query),
                key=(cache_letters(kv_layout, page_table is not None), key),
                value=(cache_letters(kv_layout, page_table is not None, "H'"), value),
                selection=("B T N P", indices),
                scale=("", logits.scale),
                logits_soft_cap=("", logits.soft_cap),
                rest=(None, rest),
                layer=("", layer),
                page_table=("B pages", page_table),
            )
            return reference.Attention(*found)

        return call

    differentiable = on_shards(xla, has_gradients=True)
    if implementation == "xla":
        return differentiable(query, key, value, logits, indices, rest, layer, page_table)

    def dispatched(*arguments):
        return backend.dispatch(xla, triton, *arguments, implementation=implementation)

    # All that is traced is an argument: what a custom_vjp closes over, it cannot differentiate.
    attend = jax.custom_vjp(on_shards(dispatched, has_gradients=False))

    def forward(*arguments):
        return attend(*arguments), arguments

    def backward(arguments, cotangents):
        *floats, indices, rest, layer, page_table = arguments

        def function_of(*floats):
            others = {"indices": indices, "rest": rest, "layer": layer, "page_table": page_table}
            return differentiable(*floats, **others)

        _, pull_back = jax.vjp(function_of, *floats)
        return (*pull_back(cotangents), None, None, None, None)

    attend.defvjp(forward, backward)
    return attend(query, key, value, logits, indices, rest, layer, page_table)


def to_physical(
    selection: Selection,
    page_table: Int32[Array, "B pages"],
    *,
    page_size: int,
    num_pages: int | None = None,
) -> Int32[Array, "B T N P"]:
    """The slots that lists name in a cache of pages, for consumers other than those here.

    Args:
      selection: what `select` returned, or lists of another kind.
      page_table: int32[B, pages], as `sparse_attention` takes it.
      page_size: tokens of a page, a power of two.
      num_pages: of the cache: a page beyond the last is then taken for the last, as the functions
        of this library take it. None leaves numbers as they are, so slots may be beyond the cache.

    Returns:
      int32[B, T, N, P], page * page_size + slot: places in a cache [num_pages * page_size, ...], in
      the order of the positions. -1 past a list's count, and for what lies on no page of the row.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.

    Source: CONTRACT.md, section 4.
    """
    sizes = _arguments.Sizes()
    sizes.learn("page_size", **_arguments.check_sizes(page_size=page_size))
    if num_pages is not None:
        num_pages = _arguments.check_sizes(num_pages=num_pages)["num_pages"]
    _arguments.check_is_selection(selection)
    lists = _arguments.annotated_arrays(Selection)["indices"]
    _arguments.check_array("selection.indices", selection.indices, lists, sizes)
    if selection.capacity is not None:
        sizes.learn("selection", S=selection.capacity)
    _arguments.check_page_table(page_table, sizes)
    of_pages = {"page_size": sizes["page_size"], "num_pages": num_pages}
    return _to_physical(selection.indices, page_table, **of_pages)


@functools.partial(backend.jit, static_argnames=("page_size", "num_pages"))
def _to_physical(
    indices: Array, page_table: Array, *, page_size: int, num_pages: int | None
) -> Array:
    number, slot = page_and_slot(indices, page_size)
    flat = jnp.where(number < 0, page_table.shape[1], number).reshape(len(indices), -1)
    page = jnp.take_along_axis(page_table, flat, axis=1, mode="fill", fill_value=-1)
    page = page.reshape(indices.shape)
    if num_pages is not None:
        page = jnp.minimum(page, np.int32(num_pages - 1))
    return jnp.where(page < 0, -1, page * page_size + slot)
