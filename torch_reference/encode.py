"""Codes of keys: the nearest centroid in each subspace."""

import torch
from torch import Tensor

# Elements of one materialised [b, h_kv, tokens, n_subvec, cent_cnt, subvec_d] product. A decode
# step's few tokens stay far below it; training on a whole context goes through it in slices.
PRODUCT_ELEMENTS = 2**28


def subvectors(keys: Tensor, n_subvec: int) -> Tensor:
    """Cuts keys [b, h_kv, n, d] into float32 [b, h_kv, n, n_subvec, subvec_d]."""
    return keys.float().unflatten(-1, (n_subvec, -1))


def augment(points: Tensor, phi: Tensor) -> Tensor:
    """Adds the coordinate that turns the largest inner product into the nearest neighbour.

    Args:
      points: float32 [b, h_kv, n, n_subvec, subvec_d].
      phi: float32 [b, h_kv, n_subvec], the largest squared norm among the training keys.

    Returns:
      float32 [b, h_kv, n, n_subvec, subvec_d + 1]; a key longer than phi gets 0 there.
    """
    squared_norm = points.square().sum(-1, keepdim=True)
    extra = (phi[:, :, None, :, None] - squared_norm).clamp(min=0).sqrt()
    return torch.cat([points, extra], dim=-1)


def tokens_a_slice(centroids: Tensor) -> int:
    """How many tokens one materialised product may hold, at least 1."""
    return max(PRODUCT_ELEMENTS // centroids.numel(), 1)


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """The centroid with the least squared distance; ties go to the lower one.

    Args:
      points: float32 [b, h_kv, n, n_subvec, subvec_d].
      centroids: float32 [b, h_kv, n_subvec, cent_cnt, subvec_d].

    Returns:
      int64 [b, h_kv, n, n_subvec].
    """

    def closest(part: Tensor) -> Tensor:
        difference = part.unsqueeze(-2) - centroids.unsqueeze(2)
        return difference.square().sum(-1).argmin(-1)

    step = tokens_a_slice(centroids)
    if points.shape[2] <= step:
        return closest(points)
    return torch.cat([closest(part) for part in points.split(step, dim=2)], dim=2)


def append_codes(
    keys: Tensor, pq_centroids: Tensor, pq_codebook: Tensor, init_offset: int, phi: Tensor | None
) -> Tensor:
    """Encodes the keys that have no codes yet and concatenates: the longer codebook.

    Args:
      keys: [b, h_kv, sk, d], all keys up to now.
      pq_centroids: [b, h_kv, n_subvec, cent_cnt, subvec_d].
      pq_codebook: int64 [b, h_kv, n_quantized, n_subvec], of the tokens from init_offset on.
      init_offset: the first token with codes.
      phi: None, or float32 [b, h_kv, n_subvec] for the inner-product metric.

    Returns:
      int64 [b, h_kv, max(sk - init_offset, 0), n_subvec]; the argument itself if nothing is new.
    """
    new = keys[:, :, init_offset + pq_codebook.shape[2] :]
    if new.shape[2] == 0:
        return pq_codebook
    points = subvectors(new, pq_centroids.shape[2])
    if phi is not None:
        points = augment(points, phi)
    return torch.cat([pq_codebook, nearest(points, pq_centroids.float())], dim=2)
