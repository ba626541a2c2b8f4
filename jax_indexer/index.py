"""PQIndex, the state of the indexer, and what makes it and makes it grow."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_indexer import _arguments, kmeans, reference
from jax_indexer.config import IndexerConfig
from jax_indexer.kernels import append as kernels
from jax_indexer.kernels import backend
from jax_indexer.layout import KVLayout, head_major, subvectors, token_axis


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
      cells: state of the "cells" selector, or None.

    Source: CONTRACT.md, section 4.
    """

    codebooks: Array
    codes: Array
    lengths: Array
    phi: Array | None = None
    cells: Any = None


def build_index(
    key: Array,
    lengths: Array,
    config: IndexerConfig,
    *,
    seed: int = 0,
    kv_layout: KVLayout = "BSKH",
) -> PQIndex:
    """Trains codebooks on the keys of a prompt and encodes all of them.

    Codebooks are trained by k-means for every (batch row, kv head, subspace) on the tokens in
    [init_offset, lengths[b]), and are float32. A subvector that is not finite, or whose squared
    norm is not, is not trained on; one that is not finite gets code 0. A row with fewer trainable
    keys than centroids uses these, repeated.

    Args:
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"), float32, bfloat16 or float16: the cache
        at its full capacity S, garbage past each row's length.
      lengths: int32[B], tokens in each row; clipped to 0..S.
      config: static parameters.
      seed: of the random numbers; the same seed gives the same index.
      kv_layout: order of the token and head axes of `key`.

    Returns:
      A PQIndex with capacity S.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.
      NotImplementedError: for `config.cells`.

    Source: CONTRACT.md, section 4; the method is that of PQCache (arXiv 2407.12820).
    """
    _arguments.check_config(config)
    sizes: dict[str, int] = {}
    _arguments.check_key("key", key, "S", kv_layout, sizes)
    _arguments.check_subspaces("key", config, sizes)
    _arguments.check_array("lengths", lengths, "B", sizes, _arguments.INT32)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected an int in 0..2**32 - 1, got {seed!r}; use seed=0")
    if config.cells:
        raise NotImplementedError('config.cells: the "cells" selector is not there yet')
    return _build(key, lengths, np.uint32(seed), config=config, kv_layout=kv_layout)


def append(
    index: PQIndex,
    key_new: Array,
    config: IndexerConfig,
    *,
    counts: Array | None = None,
    kv_layout: KVLayout = "BSKH",
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

    Returns:
      A PQIndex of the same shapes.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.

    Source: CONTRACT.md, section 4.
    """
    check_append(index, key_new, config, counts, kv_layout)
    return _append(index, key_new, counts, config=config, kv_layout=kv_layout)


def check_append(index, key_new, config, counts, kv_layout) -> dict[str, int]:
    """Checks the arguments of `append`; returns the sizes of the axes."""
    _arguments.check_config(config)
    sizes: dict[str, int] = {}
    _arguments.check_key("key_new", key_new, "t", kv_layout, sizes)
    _arguments.check_subspaces("key_new", config, sizes)
    check_index(index, config, sizes)
    if counts is not None:
        _arguments.check_array("counts", counts, "B", sizes, _arguments.INT32)
    if config.metric == "ip" and index.phi is None:
        raise ValueError(
            'index.phi: expected float32[B, K, M] for metric="ip", got None; '
            "build the index with build_index, or pass phi=..."
        )
    return sizes


def check_index(index: Any, config: IndexerConfig, sizes: dict[str, int]) -> None:
    """Checks the arrays of a PQIndex against the config and the head dimension H in `sizes`."""
    if not isinstance(index, PQIndex):
        raise ValueError(
            f"index: expected a PQIndex, got {type(index).__name__}; make one with build_index"
        )
    augmented = config.metric == "ip"
    sizes |= {
        "M": config.num_subspaces,
        "C": config.num_centroids,
        "D'": sizes["H"] // config.num_subspaces + augmented,
    }
    fix = (
        f"with num_subspaces={config.num_subspaces}, num_bits={config.num_bits}, "
        f"metric={config.metric!r} and H={sizes['H']} the config says otherwise; "
        "use the config that the index was built with"
    )
    fixes = {"M": fix, "C": fix, "D'": fix}
    _arguments.check_array(
        "index.codebooks", index.codebooks, "B K M C D'", sizes, _arguments.FLOAT_DTYPES, fixes
    )
    _arguments.check_array("index.codes", index.codes, "B K M S", sizes, _arguments.UINT8, fixes)
    _arguments.check_array("index.lengths", index.lengths, "B", sizes, _arguments.INT32)
    if index.phi is not None:
        _arguments.check_array("index.phi", index.phi, "B K M", sizes, _arguments.FLOAT32)
    if index.cells is not None:
        raise ValueError(
            f"index.cells: expected None, got {type(index.cells).__name__}; "
            'the state of the "cells" selector is not there yet'
        )


@functools.partial(jax.jit, static_argnames=("config", "kv_layout"))
def _build(
    key: Array, lengths: Array, seed: Array, *, config: IndexerConfig, kv_layout: KVLayout
) -> PQIndex:
    key = head_major(key, kv_layout)
    batch, kv_heads, capacity = key.shape[:3]
    lengths = jnp.clip(lengths, 0, capacity)
    position = jnp.arange(capacity, dtype=jnp.int32)

    def train_row(row: tuple[Array, Array]) -> tuple[Array, Array]:
        key, length = row
        parts = jnp.moveaxis(subvectors(key.astype(jnp.float32), config.num_subspaces), 2, 1)
        wanted = (position >= config.first_trained) & (position < length)
        trainable = wanted & jnp.isfinite(jnp.sum(parts * parts, axis=-1))
        parts = jnp.where(trainable[..., None], parts, 0)
        phi = jnp.max(jnp.sum(parts * parts, axis=-1), axis=-1)
        if config.metric == "ip":
            parts = reference.augment(parts, phi[..., None])
        codebooks = kmeans.train_codebooks(
            parts,
            trainable,
            length,
            seed,
            num_centroids=config.num_centroids,
            iterations=config.kmeans_iters,
        )
        return codebooks, phi

    # Row by row, which bounds memory and keeps a row's bits from depending on the batch.
    codebooks, phi = lax.map(train_row, (key, lengths))
    index = PQIndex(
        codebooks=codebooks,
        codes=jnp.zeros((batch, kv_heads, config.num_subspaces, capacity), jnp.uint8),
        lengths=jnp.zeros_like(lengths),
        phi=phi if config.metric == "ip" else None,
    )
    return _append(index, key, lengths, config=config, kv_layout="BKSH")


@functools.partial(jax.jit, static_argnames=("config", "kv_layout"))
def _append(
    index: PQIndex,
    key_new: Array,
    counts: Array | None,
    *,
    config: IndexerConfig,
    kv_layout: KVLayout,
) -> PQIndex:
    num_new = key_new.shape[token_axis(kv_layout)]
    start, taken, lengths = reference.make_room(
        index.lengths, counts, num_new, index.codes.shape[-1]
    )

    key_new, index = lax.stop_gradient((key_new, index))  # codes have none

    def xla(key_new, index, phi, start, taken):
        new = reference.encode_tokens(
            head_major(key_new, kv_layout), index.codebooks, phi, config.metric
        )
        return reference.write_codes(index.codes, new, start, taken)

    def triton(key_new, index, phi, start, taken):
        return kernels.append_codes(
            key_new, index.codebooks, index.codes, phi, start, taken, kv_layout=kv_layout
        )

    phi = index.phi if config.metric == "ip" else None
    arguments = (key_new, index, phi, start, taken)
    if backend.unaddressable(*jax.tree.leaves(arguments)):
        codes = xla(*arguments)
    else:
        codes = lax.platform_dependent(*arguments, cuda=triton, default=xla)
    return dataclasses.replace(index, codes=codes, lengths=lengths)
