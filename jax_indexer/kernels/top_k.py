"""The "top_k" selector: scores, `jax.lax.top_k` for the cut, sparse index."""

import inspect

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt8

from jax_indexer.kernels.lookup_table import Tables
from jax_indexer.kernels.output import Lists
from jax_indexer.kernels.scores import rankable_scores
from jax_indexer.kernels.sparse_index import sparse_index
from jax_indexer.kernels.step import Lengths, Step

# Only the cut is taken from top_k, not which of several equal scores it chose, so the faster
# unstable mode will do where this JAX has it.
UNSTABLE = {"is_stable": False} if "is_stable" in inspect.signature(lax.top_k).parameters else {}


def select_top_k(
    step: Step,
    tables: Tables,
    codes: UInt8[Array, "*layers R M S"],
    lengths: Lengths,
    weights: Float[Array, "R Q S"] | None,
    layer: Array | None = None,
) -> Lists:
    """Everything of a selection that follows the tables, around a library's top-k.

    Arguments and result are those of `select_threshold`.

    Source: CONTRACT.md, section 3.
    """
    scores = rankable_scores(step, tables, codes, lengths, layer)
    if step.config.heavy_size:
        cut, _ = lax.top_k(scores, step.budget, **UNSTABLE)
    else:
        cut = jnp.full((step.R, step.Q, 1), np.inf, jnp.float32)
    return sparse_index(step, scores, cut, lengths, weights)
