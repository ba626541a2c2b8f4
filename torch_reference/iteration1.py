"""Iteration 1: one Triton kernel for table, gather and sum, one dimension at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_KEYS = 128


# n_quantized grows with every step; specialised on, it would compile again now and then.
@triton.jit(do_not_specialize=["n_quantized"])
def pq_score_kernel_v1(
    query,  # float[b * h * sq, n_subvec, subvec_d]
    centroids,  # float[b * h_kv, n_subvec, cent_cnt, centroid_d]
    codebook,  # int64[b * h_kv, n_quantized, n_subvec]
    scores,  # float32[b * h * sq, n_quantized]
    n_quantized,
    QUERIES_A_KV: tl.constexpr,  # rows of query that share a key head
    N_SUBVEC: tl.constexpr,
    SUBVEC_D: tl.constexpr,
    CENT_CNT: tl.constexpr,
    CENTROID_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    blocks = tl.cdiv(n_quantized, BLOCK_KEYS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    kv_row = row // QUERIES_A_KV
    key = tl.program_id(0) % blocks * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    valid = key < n_quantized

    total = tl.zeros([BLOCK_KEYS], dtype=tl.float32)
    for m in range(N_SUBVEC):
        code_at = (kv_row * n_quantized + key) * N_SUBVEC + m
        code = tl.load(codebook + code_at, mask=valid, other=0)
        centroid = ((kv_row * N_SUBVEC + m) * CENT_CNT + code) * CENTROID_D
        subquery = (row * N_SUBVEC + m) * SUBVEC_D
        # Each load of a warp touches as many cache lines as it has distinct codes: this loop is
        # what Iteration 3 replaces.
        for d in range(SUBVEC_D):
            left = tl.load(query + subquery + d).to(tl.float32)
            right = tl.load(centroids + centroid + d, mask=valid, other=0).to(tl.float32)
            total += left * right
    tl.store(scores + row * n_quantized + key, total, mask=valid)


def scores(query: Tensor, centroids: Tensor, codebook: Tensor) -> Tensor:
    """What `eager.scores` computes, in 1-D blocks of keys for each query head."""
    b, h, sq, d = query.shape
    _, h_kv, n_subvec, cent_cnt, centroid_d = centroids.shape
    n_quantized = codebook.shape[2]
    result = torch.empty(b, h, sq, n_quantized, dtype=torch.float32, device=query.device)
    pq_score_kernel_v1[(b * h * sq * triton.cdiv(n_quantized, BLOCK_KEYS),)](
        query,
        centroids,
        codebook,
        result,
        n_quantized,
        QUERIES_A_KV=h // h_kv * sq,
        N_SUBVEC=n_subvec,
        SUBVEC_D=d // n_subvec,
        CENT_CNT=cent_cnt,
        CENTROID_D=centroid_d,
        BLOCK_KEYS=BLOCK_KEYS,
    )
    return result
