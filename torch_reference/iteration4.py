"""Iteration 4: no clone, and one Triton kernel for the list and the weights.

The scores are Iteration 3's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_reference.selection import Parts, mask_window, top_heavy


@triton.jit(do_not_specialize=["tokens"])
def generate_sparse_indices_kernel(
    top,  # int64[b * h, sq, heavy]
    sparse_list,  # int64[b * h, sink + heavy + window]
    weight_list,  # float[b * h, tokens], zeros
    tokens,
    NUM_QUERIES: tl.constexpr,
    SINK: tl.constexpr,
    HEAVY: tl.constexpr,
    WINDOW: tl.constexpr,
    INIT_OFFSET: tl.constexpr,
):
    # A program walks one head's list entry by entry, as the original does: stores of one lane.
    head = tl.program_id(0).to(tl.int64)
    entry = sparse_list + head * (SINK + HEAVY + WINDOW)
    weight = weight_list + head * tokens
    # Only the first query token's heavy ones are listed.
    chosen = top + head * NUM_QUERIES * HEAVY
    for i in range(SINK):
        tl.store(entry + i, i)
        tl.store(weight + i, 1.0)
    for i in range(HEAVY):
        token = tl.load(chosen + i) + INIT_OFFSET
        tl.store(entry + SINK + i, token)
        tl.store(weight + token, 1.0)
    for i in range(WINDOW):
        token = tokens - WINDOW + i
        tl.store(entry + SINK + HEAVY + i, token)
        tl.store(weight + token, 1.0)


def by_kernel(scores: Tensor, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `selection.by_concatenation` makes; overwrites the scores of the window."""
    top = top_heavy(mask_window(scores, parts), parts)
    b, h, sq, _ = scores.shape
    sparse_list = torch.empty(b, h, parts.listed, dtype=torch.int64, device=scores.device)
    weight_list = torch.zeros(b, h, parts.tokens, dtype=dtype, device=scores.device)
    generate_sparse_indices_kernel[(b * h,)](
        top,
        sparse_list,
        weight_list,
        parts.tokens,
        NUM_QUERIES=sq,
        SINK=parts.sink,
        HEAVY=parts.heavy,
        WINDOW=parts.window,
        INIT_OFFSET=parts.init_offset,
    )
    return torch.sort(sparse_list, dim=-1).values, weight_list
