"""PQIndex, the state of the indexer, and its life: built, grown, trained again, started again."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_indexer import _arguments, kmeans, reference
from jax_indexer.cells import (
    MOST_NEW,
    Cells,
    SealPlan,
    empty_rows,
    grow,
    no_cells,
    seal,
    seal_plan,
)
from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import backend, centroid_sums, pipeline
from jax_indexer.kernels.backend import Implementation
from jax_indexer.layout import KVLayout, head_major, token_axis

SEVERAL_LAYERS = "of an index for several layers take one at a time, by lax.scan or jax.vmap"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PQIndex:
    """The product-quantized keys of a cache: a pytree whose shapes never change while decoding.

    Attributes:
      codebooks: [B, K, M, C, D'] centroids, float32, bfloat16 or float16; D' = H // M, and one
        more for the inner-product metric.
      codes: uint8[B, K, M, S], the nearest centroid of every subvector; only the low bits count.
      lengths: int32[B], tokens in the cache; what lies past them has no meaning.
      phi: inner-product metric only, else None: float32[B, K, M], the largest squared norm of a
        training subvector.
      cells: state of the "cells" selector with `config.cells`, else None.

    Source: CONTRACT.md, section 4.
    """

    codebooks: Array
    codes: Array
    lengths: Array
    phi: Array | None = None
    cells: Cells | None = None


def build_index(
    key: Array,
    lengths: Array,
    config: IndexerConfig,
    *,
    seed: int = 0,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
) -> PQIndex:
    """Trains codebooks on the keys of a prompt and encodes all of them.

    Codebooks are trained by k-means for every (batch row, kv head, subspace) on the tokens in
    [init_offset, lengths[b]), or on a sample of `config.train_tokens` of them, and are float32. A
    subvector that is not finite, or whose squared norm is not, is not trained on; one that is not
    finite gets code 0. A row with fewer trainable keys than centroids uses these, repeated.

    Args:
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"), float32, bfloat16 or float16: the cache
        at its full capacity S, garbage past each row's length.
      lengths: int32[B], tokens in each row; clipped to 0..S.
      config: static parameters.
      seed: of the random numbers; the same seed gives the same index.
      kv_layout: order of the token and head axes of `key`.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.

    Returns:
      A PQIndex with capacity S.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype, and for more kv heads than tokens,
        which a cache of the other layout would have.
      NotImplementedError: for an implementation that is not there.

    Source: CONTRACT.md, section 4; the method is that of PQCache (arXiv 2407.12820).
    """
    _arguments.check_config(config)
    sizes = _arguments.Sizes()
    _arguments.check_key("key", key, "S", kv_layout, sizes)
    _arguments.check_subspaces("key", config, sizes)
    if sizes["K"] > sizes["S"]:  # nothing else here would tell that the axes are swapped
        raise ValueError(
            f"key: expected at most as many kv heads K as tokens S, got K={sizes['K']}, "
            f"S={sizes['S']}; pass the cache at its full capacity{sizes.understood('key')}"
        )
    _arguments.check_array("lengths", lengths, "B", sizes, _arguments.INT32)
    _check_seed(seed)
    shape = sizes["B"], sizes["K"], config.num_subspaces, sizes["S"]
    codes = jax.ShapeDtypeStruct(shape, np.uint8)
    _check_training(implementation, config, sizes, key, codes)
    return _build(
        key,
        lengths,
        np.uint32(seed),
        config=config,
        kv_layout=kv_layout,
        implementation=implementation,
    )


def rebuild(
    index: PQIndex,
    key: Array,
    config: IndexerConfig,
    rows: Array,
    *,
    lengths: Array | None = None,
    seed: int = 0,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
) -> PQIndex:
    """Trains new codebooks for some rows and encodes their tokens again; nothing else changes.

    For between decode steps: when a short prompt has grown, when the keys have drifted away from
    the codebooks (`rebuild_gain` tells), or, with `lengths`, to put a new prompt into a row. A row
    so built equals what `build_index` makes of it, bit for bit with
    float32 codebooks.

    Args:
      index: the index; donate it to have it updated in place.
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"), the cache; of rows that are not rebuilt
        it may hold anything.
      config: what the index was built with.
      rows: bool[B], the rows to rebuild. The others cost little.
      lengths: int32[B], the tokens these rows have from now on, clipped to 0..S; None for those
        they have.
      seed: of the random numbers.
      kv_layout: order of the token and head axes of `key`.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.

    Returns:
      A PQIndex of the same shapes.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.
      NotImplementedError: for an implementation that is not there.

    Source: CONTRACT.md, section 4.
    """
    sizes = _check_with_cache(index, key, config, kv_layout)
    _arguments.check_array("rows", rows, "B", sizes, _arguments.BOOL)
    if lengths is None:
        lengths = index.lengths
    else:
        _arguments.check_array("lengths", lengths, "B", sizes, _arguments.INT32)
    _check_seed(seed)
    _check_training(implementation, config, sizes, key, index)
    return _rebuild(
        index,
        key,
        lengths,
        rows,
        np.uint32(seed),
        config=config,
        kv_layout=kv_layout,
        implementation=implementation,
    )


def rebuild_gain(
    index: PQIndex,
    key: Array,
    config: IndexerConfig,
    *,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
) -> Array:
    """Says which rows `rebuild` would help: the share of their error that a first step removes.

    The squared quantization error of the trainable keys, less what it is when every centroid moves
    to the mean of the keys nearest to it, over that error: somewhat more than half of the share
    that a rebuild removes. On a language model's keys it is below 0.002 after training and above
    0.03 once the context has grown by a quarter, so a rebuild pays from about 0.02 on. It costs one
    k-means iteration over the cache, or over `config.train_tokens` tokens of it.

    What the means gain on a sample by chance alone is taken off where `train_tokens` makes one. A
    row with a codebook whose centroids are all equal, as when it was built from no more than
    `init_offset` tokens, gains 1. Under `shard_map` over heads each shard returns the number of its
    own heads.

    Args:
      index: the index.
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"), the cache.
      config: what the index was built with.
      kv_layout: order of the token and head axes of `key`.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.

    Returns:
      float32[B], in 0..1; 0 for rows without an error, and for those whose error overflows
      float32.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.
      NotImplementedError: for an implementation that is not there.

    Source: CONTRACT.md, section 4.
    """
    sizes = _check_with_cache(index, key, config, kv_layout)
    _check_training(implementation, config, sizes, key, index)
    return _rebuild_gain(
        index, key, config=config, kv_layout=kv_layout, implementation=implementation
    )


def reset(index: PQIndex, rows: Array) -> PQIndex:
    """Empties some rows: their length becomes 0, and their codebooks stay until rebuilt.

    Args:
      index: the index.
      rows: bool[B], the rows to empty.

    Returns:
      A PQIndex of the same shapes.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.

    Source: CONTRACT.md, section 4.
    """
    _check_type(index)
    sizes = _arguments.Sizes()
    fixes = {"B": SEVERAL_LAYERS}
    _arguments.check_array("index.lengths", index.lengths, "B", sizes, _arguments.INT32, fixes)
    _arguments.check_array("rows", rows, "B", sizes, _arguments.BOOL)
    if index.cells is not None:
        _check_cells(index.cells, sizes)
    cells = None if index.cells is None else empty_rows(index.cells, rows)
    return dataclasses.replace(index, lengths=jnp.where(rows, 0, index.lengths), cells=cells)


def with_cells(index: PQIndex, config: IndexerConfig) -> PQIndex:
    """Makes the state of the "cells" selector for an index that was made without it.

    For an index from given codebooks and codes; `build_index` makes the state by itself, and all
    other functions keep it up to date.

    Args:
      index: the index; a state that it has is made anew.
      config: with `cells=True`.

    Returns:
      A PQIndex with `cells`.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.

    Source: CONTRACT.md, section 4.
    """
    _arguments.check_config(config)
    _check_type(index)
    if not config.cells:
        raise ValueError("config.cells: expected True, got False; use dataclasses.replace")
    sizes = _arguments.Sizes()
    shape = getattr(index.codebooks, "shape", ())
    if len(shape) == 5 and shape[2] != config.num_subspaces:
        raise ValueError(
            f"index.codebooks: expected M={config.num_subspaces} as in config, got M={shape[2]}; "
            "use the config that the index was built with"
        )
    if len(shape) == 5:
        augmented = config.metric == "ip"
        sizes.learn("index.codebooks", H=(shape[-1] - augmented) * config.num_subspaces)
    else:
        sizes.learn("index.codebooks", H=config.num_subspaces)
    index = dataclasses.replace(index, cells=None)
    _check_arrays(index, config, sizes)
    return _with_cells(index, config=config)


def append(
    index: PQIndex,
    key_new: Array,
    config: IndexerConfig,
    *,
    counts: Array | None = None,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
) -> PQIndex:
    """Encodes new tokens against the codebooks and appends them; never trains.

    A row takes all of its new tokens or none: one that would pass the capacity keeps its state,
    and its unchanged length is the report.

    Args:
      index: the index; donate it to have it updated in place.
      key_new: [B, t, K, H] ("BSKH") or [B, K, t, H] ("BKSH"), float32, bfloat16 or float16.
      config: what the index was built with.
      counts: int32[B], how many of the t tokens each row takes, clipped to 0..t; None for t.
      kv_layout: order of the token and head axes of `key_new`.
      implementation: "triton", "xla", or None: Triton on an NVIDIA GPU where it supports the
        case, else XLA.

    Returns:
      A PQIndex of the same shapes.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype, and for t > S without `counts`.
      NotImplementedError: for an implementation that is not there.

    Source: CONTRACT.md, section 4.
    """
    check_append(index, key_new, config, counts, kv_layout, implementation)
    return _append(
        index,
        key_new,
        counts,
        config=config,
        kv_layout=kv_layout,
        implementation=implementation,
    )


def check_append(index, key_new, config, counts, kv_layout, implementation) -> None:
    """Checks the arguments of `append`."""
    _arguments.check_config(config)
    sizes = _arguments.Sizes()
    _arguments.check_key("key_new", key_new, "t", kv_layout, sizes)
    _arguments.check_subspaces("key_new", config, sizes)
    check_index(index, config, sizes)
    if counts is not None:
        _arguments.check_array("counts", counts, "B", sizes, _arguments.INT32)
    elif sizes["t"] > sizes["S"]:
        raise ValueError(
            f"key_new: expected at most t=S={sizes['S']} tokens, as many as a row can hold, "
            f"got t={sizes['t']}; pass fewer, or counts{sizes.understood('key_new')}"
        )
    _check_phi(index, config)
    _arguments.check_implementation(implementation, key_new, index)


def _check_training(implementation, config, sizes, *operands) -> None:
    """Checks that "triton", if it is asked for, trains codebooks of these sizes."""
    dimensions = sizes["H"] // config.num_subspaces
    unsupported = centroid_sums.unsupported(config.num_centroids, dimensions)
    _arguments.check_implementation(implementation, *operands, unsupported=unsupported)


def _check_with_cache(index, key, config, kv_layout) -> _arguments.Sizes:
    """Checks an index and the cache it is of; returns the sizes of the axes."""
    _arguments.check_config(config)
    sizes = _arguments.Sizes()
    _arguments.check_key("key", key, "S", kv_layout, sizes)
    _arguments.check_subspaces("key", config, sizes)
    check_index(index, config, sizes)
    _check_phi(index, config)
    return sizes


def _check_phi(index: PQIndex, config: IndexerConfig) -> None:
    if config.metric == "ip" and index.phi is None:
        raise ValueError(
            'index.phi: expected float32[B, K, M] for metric="ip", got None; '
            "build the index with build_index, or pass phi=..."
        )


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(
            f"seed: expected an int in 0..2**32 - 1, got {seed!r}; it is static: pass a Python int"
        )


def _check_type(index: Any) -> None:
    if not isinstance(index, PQIndex):
        raise ValueError(
            f"index: expected a PQIndex, got {type(index).__name__}; make one with build_index"
        )


def check_index(index: Any, config: IndexerConfig, sizes: _arguments.Sizes) -> None:
    """Checks the arrays of a PQIndex against the config and the head dimension H in `sizes`."""
    _check_type(index)
    _check_arrays(index, config, sizes)
    cells = index.cells
    if (cells is not None) != config.cells:
        wanted, got, advice = None, type(cells).__name__, "dataclasses.replace(index, cells=None)"
        if config.cells:
            wanted, got, advice = "a state", None, "with_cells(index, config)"
        raise ValueError(
            f"index.cells: expected {wanted} with config.cells={config.cells}, got {got}; "
            f"use {advice}, or the config that the index was built with"
        )
    if cells is None:
        return
    sizes.learn("config", **{"C**M+1": config.num_cells + 1})
    _check_cells(cells, sizes)
    plan = seal_plan(sizes["S"], config)
    if cells.plan != plan:
        raise ValueError(
            f"index.cells.plan: expected {plan}, got {cells.plan}; use the config that the index "
            "was built with, or with_cells(index, config)"
        )


def _check_cells(cells: Any, sizes: _arguments.Sizes) -> None:
    """Checks the state of the "cells" selector against the sizes that are known."""
    if not isinstance(cells, Cells) or not isinstance(cells.plan, SealPlan):
        plan = f" with {type(cells.plan).__name__}" if isinstance(cells, Cells) else ""
        raise ValueError(
            "index.cells: expected None, or Cells with a SealPlan, "
            f"got {type(cells).__name__}{plan}; use with_cells(index, config)"
        )
    sizes.learn("PQIndex", **{"before/after": 2})
    sizes.learn("index.cells.plan", segment=cells.plan.segment, ring=cells.plan.ring)
    for name, letters in (
        ("starts", "B K before/after C**M+1"),
        ("order", "B K S"),
        ("earlier", "B K segment"),
        ("ring", "B K ring"),
        ("base", "B"),
    ):
        array = getattr(cells, name)
        _arguments.check_array(f"index.cells.{name}", array, letters, sizes, _arguments.INT32)


def _check_arrays(index: PQIndex, config: IndexerConfig, sizes: _arguments.Sizes) -> None:
    augmented = config.metric == "ip"
    dimensions = {"D'": sizes["H"] // config.num_subspaces + augmented}
    sizes.learn("config", M=config.num_subspaces, C=config.num_centroids, **dimensions)
    fix = (
        f"with num_subspaces={config.num_subspaces}, num_bits={config.num_bits}, "
        f"metric={config.metric!r} and H={sizes['H']} the config says otherwise; "
        "use the config that the index was built with"
    )
    fixes = {"M": fix, "C": fix, "D'": fix, "B K M C D'": SEVERAL_LAYERS}
    _arguments.check_array(
        "index.codebooks", index.codebooks, "B K M C D'", sizes, _arguments.FLOAT_DTYPES, fixes
    )
    _arguments.check_array("index.codes", index.codes, "B K M S", sizes, _arguments.UINT8, fixes)
    _arguments.check_array("index.lengths", index.lengths, "B", sizes, _arguments.INT32)
    if index.phi is not None:
        _arguments.check_array("index.phi", index.phi, "B K M", sizes, _arguments.FLOAT32)


@functools.partial(jax.jit, static_argnames=("config",))
def _with_cells(index: PQIndex, *, config: IndexerConfig) -> PQIndex:
    batch, kv_heads, _, capacity = index.codes.shape
    cells = no_cells(batch, kv_heads, capacity, config)
    every_row = jnp.ones(batch, bool)
    cells = seal(cells, index.codes, index.lengths, every_row, config)
    return dataclasses.replace(index, cells=cells)


@functools.partial(jax.jit, static_argnames=("config", "kv_layout", "implementation"))
def _build(
    key: Array,
    lengths: Array,
    seed: Array,
    *,
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: Implementation | None,
) -> PQIndex:
    batch, capacity = key.shape[0], key.shape[token_axis(kv_layout)]
    kv_heads, augmented = head_major(key, kv_layout).shape[1], config.metric == "ip"
    of_subspaces = (batch, kv_heads, config.num_subspaces)
    size = key.shape[-1] // config.num_subspaces + augmented
    empty = PQIndex(
        codebooks=jnp.zeros((*of_subspaces, config.num_centroids, size), jnp.float32),
        codes=jnp.zeros((*of_subspaces, capacity), jnp.uint8),
        lengths=jnp.zeros(batch, jnp.int32),
        phi=jnp.zeros(of_subspaces, jnp.float32) if augmented else None,
        cells=no_cells(batch, kv_heads, capacity, config) if config.cells else None,
    )
    every_row = jnp.ones(batch, bool)
    options = {"config": config, "kv_layout": kv_layout, "implementation": implementation}
    return _rebuild(empty, key, lengths, every_row, seed, **options)


@functools.partial(jax.jit, static_argnames=("config", "kv_layout", "implementation"))
def _rebuild(
    index: PQIndex,
    key: Array,
    lengths: Array,
    rows: Array,
    seed: Array,
    *,
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: Implementation | None,
) -> PQIndex:
    key, index = lax.stop_gradient((key, index))
    # The other rows have no token to train on and none to encode.
    lengths = jnp.where(rows, jnp.clip(lengths, 0, index.codes.shape[-1]), 0)
    keys = kmeans.training_set(key, lengths, config, kv_layout)
    trained = kmeans.train(keys, lengths, seed, config, kv_layout, implementation)

    codebooks = jnp.where(
        jnp.expand_dims(rows, (1, 2, 3, 4)),
        trained.astype(index.codebooks.dtype),
        index.codebooks,
    )
    phi = index.phi
    if phi is not None and keys.phi is not None:
        phi = jnp.where(jnp.expand_dims(rows, (1, 2)), keys.phi, phi)
    started = dataclasses.replace(
        index,
        codebooks=codebooks,
        phi=phi,
        lengths=jnp.where(rows, 0, index.lengths),
        cells=None if index.cells is None else empty_rows(index.cells, rows),
    )
    options = {"config": config, "kv_layout": kv_layout, "implementation": implementation}
    return _append(started, key, lengths, **options)


@functools.partial(jax.jit, static_argnames=("config", "kv_layout", "implementation"))
def _rebuild_gain(
    index: PQIndex,
    key: Array,
    *,
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: Implementation | None,
) -> Array:
    key, index = lax.stop_gradient((key, index))
    lengths = jnp.clip(index.lengths, 0, index.codes.shape[-1])
    keys = kmeans.training_set(key, lengths, config, kv_layout)
    if config.metric == "ip":  # distances are to the centroids as they were trained
        keys = keys._replace(phi=index.phi)
    return kmeans.first_step_gain(keys, index.codebooks, kv_layout, implementation)


@functools.partial(jax.jit, static_argnames=("config", "kv_layout", "implementation"))
def _append(
    index: PQIndex,
    key_new: Array,
    counts: Array | None,
    *,
    config: IndexerConfig,
    kv_layout: KVLayout,
    implementation: Implementation | None,
) -> PQIndex:
    num_new = key_new.shape[token_axis(kv_layout)]
    start, taken, lengths = reference.make_room(
        index.lengths, counts, num_new, index.codes.shape[-1]
    )

    key_new, index = lax.stop_gradient((key_new, index))  # codes have none

    def xla(key_new, index, phi, start, taken):
        new = reference.encode_tokens(
            head_major(key_new, kv_layout), index.codebooks, phi, taken, config.metric
        )
        codes, cells = reference.write_codes(index.codes, new, start, taken), index.cells
        if cells is not None and num_new <= MOST_NEW:
            cells = grow(cells, codes, start, start + taken, config)
        elif cells is not None:
            cells = seal(cells, codes, start + taken, taken > 0, config)
        return codes, cells

    def triton(key_new, index, phi, start, taken):
        made = pipeline.append_tokens(
            key_new,
            index.codebooks,
            index.codes,
            phi,
            index.cells,
            start,
            taken,
            config,
            kv_layout=kv_layout,
        )
        return made.codes, made.cells

    phi = index.phi if config.metric == "ip" else None
    arguments = key_new, index, phi, start, taken
    codes, cells = backend.dispatch(xla, triton, *arguments, implementation=implementation)
    return dataclasses.replace(index, codes=codes, lengths=lengths, cells=cells)
