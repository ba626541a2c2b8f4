"""A product-quantization sparse-attention indexer for JAX on NVIDIA GPUs; see CONTRACT.md."""

from jax_indexer.attend import sparse_attention
from jax_indexer.config import IndexerConfig
from jax_indexer.index import (
    append,
    build_index,
    rebuild,
    rebuild_gain,
    reset,
    with_cells,
)
from jax_indexer.select import indexer_next, select
from jax_indexer.state import PQIndex, Selection

__all__ = [
    "IndexerConfig",
    "PQIndex",
    "Selection",
    "append",
    "build_index",
    "indexer_next",
    "rebuild",
    "rebuild_gain",
    "reset",
    "select",
    "sparse_attention",
    "with_cells",
]
