"""Block sizes and warps, chosen by measurement; benchmarks/NOTES.md has the alternatives tried."""

from typing import Literal

# A program's tile of a codebook, in elements: more of it does not fit into registers.
CODEBOOK_TILE = 8192
CODEBOOK_WARPS = 4

# Tokens that one program of the append kernel encodes when there are many to encode.
TOKENS_PER_ENCODER = 64

# ADC scores: tokens a program scores, and query heads that share one load of their codes. Four
# tokens a thread: with eight, sixteen subspaces spill (133 us became 650 at M=16, 8 bits).
SCORE_BLOCK = 1024
SCORE_WARPS = 8
SCORE_QUERIES = 8

# Sparse index: tokens a program looks at.
INDEX_BLOCK = 1024
INDEX_WARPS = 4


def select_tuning(size: int) -> tuple[int, int]:
    """Numbers that a program of the threshold-select kernel holds at once, and its warps.

    At 2048 numbers 4 / 8 / 16 warps took 24 / 18 / 18 us, at 4096 8 / 16 / 32 warps 28 / 27 / 31,
    at 16384 8 / 16 / 32 warps 102 / 86 / 97.
    """
    chunk = min(max(1 << (size - 1).bit_length(), 128), 16384)
    return chunk, min(max(chunk // 128, 1), 16)


def default_selector(num_subspaces: int) -> Literal["threshold", "top_k"]:
    """The faster selector, in kernel time on an H100.

    "threshold" against "top_k": M = 2, 28 / 56 us at 32000 tokens, 48 / 225 at batch 4 and 131072;
    M = 16, 350 / 330 there. Between these numbers of subspaces nothing was measured.
    """
    return "threshold" if num_subspaces <= 8 else "top_k"
