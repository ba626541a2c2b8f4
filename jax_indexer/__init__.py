"""Sparse decode attention by product quantization for JAX on NVIDIA GPUs; see CONTRACT.md."""

from jax_indexer.attend import sparse_attention, to_physical
from jax_indexer.config import IndexerConfig
from jax_indexer.decode import decode_attention, empty_cache, prefill, prefill_chunk
from jax_indexer.index import (
    append,
    build_index,
    rebuild,
    rebuild_gain,
    reset,
    truncate,
    with_cells,
)
from jax_indexer.rope import Rope
from jax_indexer.select import indexer_next, select
from jax_indexer.sharding import partition_specs
from jax_indexer.state import DecodeCache, PQIndex, Recent, Rest, Selection

__all__ = [
    "DecodeCache",
    "IndexerConfig",
    "PQIndex",
    "Recent",
    "Rest",
    "Rope",
    "Selection",
    "append",
    "build_index",
    "decode_attention",
    "empty_cache",
    "indexer_next",
    "partition_specs",
    "prefill",
    "prefill_chunk",
    "rebuild",
    "rebuild_gain",
    "reset",
    "select",
    "sparse_attention",
    "to_physical",
    "truncate",
    "with_cells",
]
