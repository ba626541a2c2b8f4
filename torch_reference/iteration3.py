"""Iteration 3: blocks of whole centroids, [BLOCK_KEYS, BLOCK_D], loaded by code, autotuned."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_reference.tuning import size_class, tuned


@tuned(
    configs=[
        triton.Config({"BLOCK_KEYS": 128, "BLOCK_D": 32}, num_warps=4),
        triton.Config({"BLOCK_KEYS": 256, "BLOCK_D": 32}, num_warps=8),
        triton.Config({"BLOCK_KEYS": 128, "BLOCK_D": 64}, num_warps=4),
        triton.Config({"BLOCK_KEYS": 256, "BLOCK_D": 64}, num_warps=8),
    ],
    key=["SUBVEC_D", "size_class"],
)
@triton.jit(do_not_specialize=["n_quantized", "size_class"])
def pq_score_kernel_v3(
    query,  # float[b * h * sq, n_subvec, subvec_d]
    centroids,  # float[b * h_kv, n_subvec, cent_cnt, centroid_d]
    codebook,  # int64[b * h_kv, n_quantized, n_subvec]
    scores,  # float32[b * h * sq, n_quantized]
    n_quantized,
    size_class,  # read by the autotuner alone
    QUERIES_A_KV: tl.constexpr,  # rows of query that share a key head
    N_SUBVEC: tl.constexpr,
    SUBVEC_D: tl.constexpr,
    CENT_CNT: tl.constexpr,
    CENTROID_D: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
        for start in range(0, SUBVEC_D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            real = d < SUBVEC_D
            left = tl.load(query + subquery + d, mask=real, other=0).to(tl.float32)
            right = tl.load(
                centroids + centroid[:, None] + d[None, :],
                mask=valid[:, None] & real[None, :],
                other=0,
            ).to(tl.float32)
            total += tl.sum(left[None, :] * right, axis=1)
    tl.store(scores + row * n_quantized + key, total, mask=valid)


def scores(query: Tensor, centroids: Tensor, codebook: Tensor) -> Tensor:
    """What `eager.scores` computes, with neighbouring lanes reading neighbouring dimensions."""
    b, h, sq, d = query.shape
    _, h_kv, n_subvec, cent_cnt, centroid_d = centroids.shape
    n_quantized = codebook.shape[2]
    result = torch.empty(b, h, sq, n_quantized, dtype=torch.float32, device=query.device)

    def grid(meta):
        return (b * h * sq * triton.cdiv(n_quantized, meta["BLOCK_KEYS"]),)

    pq_score_kernel_v3[grid](
        query,
        centroids,
        codebook,
        result,
        n_quantized,
        size_class(b * h * sq, n_quantized),
        QUERIES_A_KV=h // h_kv * sq,
        N_SUBVEC=n_subvec,
        SUBVEC_D=d // n_subvec,
        CENT_CNT=cent_cnt,
        CENTROID_D=centroid_d,
    )
    return result
