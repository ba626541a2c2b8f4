"""Iteration 2: 2-D blocks of queries and keys, autotuned, still one dimension at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_reference.tuning import size_class, tuned


@tuned(
    configs=[
        triton.Config({"BLOCK_QUERIES": 1, "BLOCK_KEYS": 128}, num_warps=4),
        triton.Config({"BLOCK_QUERIES": 1, "BLOCK_KEYS": 256}, num_warps=8),
        triton.Config({"BLOCK_QUERIES": 4, "BLOCK_KEYS": 128}, num_warps=4),
        triton.Config({"BLOCK_QUERIES": 4, "BLOCK_KEYS": 256}, num_warps=8),
    ],
    key=["NUM_QUERIES", "SUBVEC_D", "size_class"],
)
@triton.jit(do_not_specialize=["n_quantized", "size_class"])
def pq_score_kernel_v2(
    query,  # float[b * h, sq, n_subvec, subvec_d]
    centroids,  # float[b * h_kv, n_subvec, cent_cnt, centroid_d]
    codebook,  # int64[b * h_kv, n_quantized, n_subvec]
    scores,  # float32[b * h, sq, n_quantized]
    n_quantized,
    size_class,  # read by the autotuner alone
    NUM_QUERIES: tl.constexpr,  # sq
    GROUP: tl.constexpr,  # query heads that share a key head
    N_SUBVEC: tl.constexpr,
    SUBVEC_D: tl.constexpr,
    CENT_CNT: tl.constexpr,
    CENTROID_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    key_blocks = tl.cdiv(n_quantized, BLOCK_KEYS)
    query_blocks = tl.cdiv(NUM_QUERIES, BLOCK_QUERIES)
    block = tl.program_id(0) // key_blocks
    head = (block // query_blocks).to(tl.int64)
    kv_row = head // GROUP
    token = block % query_blocks * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    key = tl.program_id(0) % key_blocks * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    asked = token < NUM_QUERIES
    valid = key < n_quantized
    row = head * NUM_QUERIES + token

    total = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], dtype=tl.float32)
    for m in range(N_SUBVEC):
        code_at = (kv_row * n_quantized + key) * N_SUBVEC + m
        code = tl.load(codebook + code_at, mask=valid, other=0)
        centroid = ((kv_row * N_SUBVEC + m) * CENT_CNT + code) * CENTROID_D
        subquery = (row * N_SUBVEC + m) * SUBVEC_D
        for d in range(SUBVEC_D):
            left = tl.load(query + subquery + d, mask=asked, other=0).to(tl.float32)
            right = tl.load(centroids + centroid + d, mask=valid, other=0).to(tl.float32)
            total += left[:, None] * right[None, :]
    tl.store(
        scores + row[:, None] * n_quantized + key[None, :],
        total,
        mask=asked[:, None] & valid[None, :],
    )


def scores(query: Tensor, centroids: Tensor, codebook: Tensor) -> Tensor:
    """What `eager.scores` computes, in 2-D blocks for each query head."""
    b, h, sq, d = query.shape
    _, h_kv, n_subvec, cent_cnt, centroid_d = centroids.shape
    n_quantized = codebook.shape[2]
    result = torch.empty(b, h, sq, n_quantized, dtype=torch.float32, device=query.device)

    def grid(meta):
        query_blocks = triton.cdiv(sq, meta["BLOCK_QUERIES"])
        return (b * h * query_blocks * triton.cdiv(n_quantized, meta["BLOCK_KEYS"]),)

    pq_score_kernel_v2[grid](
        query,
        centroids,
        codebook,
        result,
        n_quantized,
        size_class(b * h * sq, n_quantized),
        NUM_QUERIES=sq,
        GROUP=h // h_kv,
        N_SUBVEC=n_subvec,
        SUBVEC_D=d // n_subvec,
        CENT_CNT=cent_cnt,
        CENTROID_D=centroid_d,
    )
    return result
