"""The first call: k-means centroids, and codes for the tokens they were trained on."""

import torch
from torch import Tensor

from torch_reference import checks
from torch_reference.encode import augment, nearest, subvectors, tokens_a_slice


@torch.no_grad()
def indexer_first(
    keys: Tensor,
    *,
    pq_group_factor: int,
    pq_bits: int,
    kmeans_iter: int = 10,
    init_offset: int,
    metric: str = "euclidean",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Trains centroids on the tokens from `init_offset` on, all heads and subspaces in one batch.

    Lloyd's iterations over products of [n, cent_cnt, subvec_d] elements a head and subspace, held
    in memory as the original does (in slices of tokens once one passes a gigabyte), always
    `kmeans_iter` of them. A cluster that runs empty takes a random key.

    Args:
      keys: float32, bfloat16 or float16 [b, h_kv, sk, d].
      pq_group_factor: number of subspaces (n_subvec), a divisor of d.
      pq_bits: bits of a code; cent_cnt = 2**pq_bits.
      kmeans_iter: Lloyd iterations.
      init_offset: the first token to train on and to encode.
      metric: "euclidean", or "ip" to train on keys augmented by one coordinate.
      seed: of the random starts, one stream a device type.

    Returns:
      pq_centroids: float32 [b, h_kv, n_subvec, cent_cnt, subvec_d], one dimension more for "ip".
        With fewer keys than centroids the keys repeat; without any they are zeros.
      pq_codebook: int64 [b, h_kv, max(sk - init_offset, 0), n_subvec].
      ip2l2_phi: None, or for "ip" float32 [b, h_kv, n_subvec], the largest squared norm.

    Raises:
      ValueError: for wrong sizes, shapes, dtypes or metric, naming the argument.

    Source: PQCache, arXiv 2407.12820.
    """
    n_subvec = checks.size("pq_group_factor", pq_group_factor, 1)
    cent_cnt = 2 ** checks.size("pq_bits", pq_bits, 1)
    kmeans_iter = checks.size("kmeans_iter", kmeans_iter)
    init_offset = checks.size("init_offset", init_offset)
    checks.metric(metric)
    checks.keys(keys, n_subvec)

    points = subvectors(keys[:, :, init_offset:], n_subvec)
    b, h_kv, n, _, subvec_d = points.shape
    phi = None
    if metric == "ip":
        phi = points.new_zeros(b, h_kv, n_subvec)
        if n:
            phi = points.square().sum(-1).amax(2)
        points = augment(points, phi)
        subvec_d += 1
    if n == 0:
        centroids = points.new_zeros(b, h_kv, n_subvec, cent_cnt, subvec_d)
        return centroids, torch.zeros_like(points[..., 0], dtype=torch.int64), phi

    generator = torch.Generator(keys.device).manual_seed(seed)
    order = torch.rand(b, h_kv, n_subvec, n, generator=generator, device=keys.device)
    start = order.topk(min(cent_cnt, n), dim=-1).indices
    repeats = -(-cent_cnt // n)
    centroids = _take(points, start.repeat(1, 1, 1, repeats)[..., :cent_cnt])
    for _ in range(kmeans_iter if n > cent_cnt else 0):
        sums, counts = _cluster_sums(points, centroids)
        spare = torch.randint(n, counts.shape, generator=generator, device=keys.device)
        means = sums / counts.clamp(min=1).unsqueeze(-1)
        centroids = torch.where(counts.unsqueeze(-1) > 0, means, _take(points, spare))
    return centroids, nearest(points, centroids), phi


def _take(points: Tensor, token: Tensor) -> Tensor:
    """Rows of points [b, h_kv, n, n_subvec, D] by token [b, h_kv, n_subvec, C], D last."""
    index = token.unsqueeze(-1).expand(*token.shape, points.shape[-1])
    return points.transpose(2, 3).gather(3, index)


def _cluster_sums(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Sum [b, h_kv, n_subvec, C, D] and number [b, h_kv, n_subvec, C] of each centroid's points."""
    names = torch.arange(centroids.shape[3], device=points.device)
    sums = torch.zeros_like(centroids)
    counts = torch.zeros_like(centroids[..., 0])
    for part in points.split(tokens_a_slice(centroids), dim=2):
        member = (nearest(part, centroids).unsqueeze(-1) == names).float()
        # A sum over one-hot products, not an atomic scatter: the same bits on every run.
        sums += (part.unsqueeze(-2) * member.unsqueeze(-1)).sum(2)
        counts += member.sum(2)
    return sums, counts
