"""One decode step, and the registry of the forms it comes in."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from torch_reference import checks, eager, iteration1, iteration2, iteration3, iteration4
from torch_reference.encode import append_codes
from torch_reference.selection import Parts, by_concatenation, every_token
from torch_reference.tuning import INTERPRETED


@dataclasses.dataclass(frozen=True)
class IndexerNext:
    """One form of the decode step: the two stages in which the iterations differ.

    Attributes:
      scores: (query, centroids, codebook) -> scores.
      lists: (scores, parts, weight dtype) -> list, weights; may overwrite the scores.
      has_kernels: whether a stage is a Triton kernel.
    """

    scores: Callable[[Tensor, Tensor, Tensor], Tensor]
    lists: Callable[[Tensor, Parts, torch.dtype], tuple[Tensor, Tensor]]
    has_kernels: bool

    @torch.no_grad()
    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        pq_centroids: Tensor,
        pq_codebook: Tensor,
        *,
        sink_size: int,
        window_size: int,
        heavy_size: int,
        init_offset: int,
        metric: str = "euclidean",
        ip2l2_phi: Tensor | None = None,
        check_values: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encodes the new keys, scores all, and lists sink, heavy and window tokens for each head.

        A context of at most heavy_size + init_offset + sq + cent_cnt tokens is listed whole. The
        package's docstring names what a list may hold twice.

        Args:
          query: float32, bfloat16 or float16 [b, h, sq, d], contiguous.
          keys: [b, h_kv, sk, d], all keys up to now, the new ones included; h_kv divides h.
          pq_centroids: [b, h_kv, n_subvec, cent_cnt, subvec_d], one dimension more for "ip";
            contiguous.
          pq_codebook: int64 [b, h_kv, n_quantized, n_subvec], contiguous: codes of the tokens from
            init_offset on. Keys beyond them are the new ones.
          sink_size: tokens at the start to list; no more than sk are.
          window_size: tokens at the end to list; no more than sk are.
          heavy_size: tokens to list by score.
          init_offset: the first token with codes.
          metric: "euclidean" or "ip", which the centroids were trained for.
          ip2l2_phi: for "ip", float32 [b, h_kv, n_subvec] from indexer_first.
          check_values: also check what takes reading values back from the device (codes in range).
            Without it nothing waits for the device; a code out of range reads out of bounds.

        Returns:
          sparse_list: int64 [b, h, sparse_len_max], ascending.
          sparse_len: int64 [b, h].
          weight_list: [b, h, sq, sk] in the query's dtype, 1 at listed tokens, else 0.
          pq_codebook: int64 [b, h_kv, sk - init_offset, n_subvec].

        Raises:
          ValueError: naming the argument, what was expected, what came, and what to do.
        """
        sink_size = checks.size("sink_size", sink_size)
        window_size = checks.size("window_size", window_size)
        heavy_size = checks.size("heavy_size", heavy_size)
        init_offset = checks.size("init_offset", init_offset)
        checks.step(query, keys, pq_centroids, pq_codebook, ip2l2_phi, init_offset, metric)
        if self.has_kernels:
            checks.kernel_device(query, INTERPRETED)
        cent_cnt = pq_centroids.shape[3]
        if check_values:
            checks.codes(pq_codebook, cent_cnt)

        pq_codebook = append_codes(keys, pq_centroids, pq_codebook, init_offset, ip2l2_phi)
        b, h, sq, _ = query.shape
        sk = keys.shape[2]
        if sk <= heavy_size + init_offset + sq + cent_cnt:
            sparse_list, weight_list = every_token(query, sk)
        else:
            parts = Parts(
                tokens=sk,
                sink=min(sink_size, sk),
                heavy=heavy_size,  # the short-context rule left more scores than that
                window=min(window_size, sk),
                init_offset=init_offset,
            )
            scores = self.scores(query, pq_centroids, pq_codebook)
            sparse_list, weight_list = self.lists(scores, parts, query.dtype)
        sparse_len = torch.full((b, h), sparse_list.shape[-1], device=query.device)
        if sq > 1:
            weight_list = weight_list.unsqueeze(2).repeat(1, 1, sq, 1)
        return sparse_list, sparse_len, weight_list.view(b, h, sq, sk), pq_codebook


ITERATIONS = {
    "eager": IndexerNext(eager.scores, by_concatenation, has_kernels=False),
    "iteration1": IndexerNext(iteration1.scores, by_concatenation, has_kernels=True),
    "iteration2": IndexerNext(iteration2.scores, by_concatenation, has_kernels=True),
    "iteration3": IndexerNext(iteration3.scores, by_concatenation, has_kernels=True),
    "iteration4": IndexerNext(iteration3.scores, iteration4.by_kernel, has_kernels=True),
}
