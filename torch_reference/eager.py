"""Scores in plain PyTorch: a look-up table by matrix product, a gather a subspace, a sum."""

import functools

import torch
from torch import Tensor

from torch_reference import checks


def scores(query: Tensor, centroids: Tensor, codebook: Tensor) -> Tensor:
    """The inner product of each query with each key's centroids, added in the subspaces' order.

    Args:
      query: [b, h, sq, d].
      centroids: [b, h_kv, n_subvec, cent_cnt, subvec_d or more]; dimensions past subvec_d, the
        augmented one, are not read.
      codebook: int64 [b, h_kv, n_quantized, n_subvec].

    Returns:
      float32 [b, h, sq, n_quantized], accumulated in float32, never in TF32.
    """
    checks.full_float32_matmul(query.device)
    b, h, sq, d = query.shape
    h_kv, n_subvec = centroids.shape[1:3]
    rows = h // h_kv * sq
    subvec_d = d // n_subvec
    subqueries = query.float().view(b, h_kv, rows, n_subvec, subvec_d).transpose(2, 3)
    table = subqueries @ centroids[..., :subvec_d].float().transpose(-1, -2)
    entries = []
    for m in range(n_subvec):
        codes = codebook[:, :, None, :, m].expand(-1, -1, rows, -1)
        entries.append(table[:, :, m].gather(-1, codes))
    return functools.reduce(torch.add, entries).view(b, h, sq, -1)
