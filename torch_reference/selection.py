"""From scores to the list: masking, top-k, concatenation, sorting and weights in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """The sizes of a list's three parts, none larger than what there is.

    Attributes:
      tokens: all keys, sk.
      sink: listed tokens at the start.
      heavy: listed tokens with the highest scores.
      window: listed tokens at the end.
      init_offset: the token that score 0 belongs to.
    """

    tokens: int
    sink: int
    heavy: int
    window: int
    init_offset: int

    @property
    def listed(self) -> int:
        """Entries of a list, doubled tokens counted twice."""
        return self.sink + self.heavy + self.window

    @property
    def first_masked(self) -> int:
        """The score of the window's first token."""
        return max(self.tokens - self.window - self.init_offset, 0)


def mask_window(scores: Tensor, parts: Parts) -> Tensor:
    """Puts -inf, in place, where the window is."""
    scores[..., parts.first_masked :] = float("-inf")
    return scores


def top_heavy(scores: Tensor, parts: Parts) -> Tensor:
    """Score indices int64 [b, h, sq, heavy] of the highest scores; equal ones as torch.topk does.

    With fewer unmasked scores than `heavy` the rest are masked ones: window tokens.
    """
    return torch.topk(scores, parts.heavy, dim=-1).indices


def by_concatenation(scores: Tensor, parts: Parts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The list as eager code and Iterations 1 to 3 make it: clone, mask, top-k, cat, sort, scatter.

    Args:
      scores: float32 [b, h, sq, n_quantized].
      parts: sizes of the list's parts.
      dtype: of the weights.

    Returns:
      sparse_list: int64 [b, h, listed], ascending, the first query token's.
      weight_list: [b, h, sk], 1 at listed tokens.
    """
    masked = mask_window(scores.clone(), parts)
    heavy = top_heavy(masked, parts)[:, :, 0] + parts.init_offset
    b, h = heavy.shape[:2]
    device = scores.device
    sink = torch.arange(parts.sink, device=device)
    window = torch.arange(parts.tokens - parts.window, parts.tokens, device=device)
    unsorted = torch.cat([sink.expand(b, h, -1), heavy, window.expand(b, h, -1)], dim=-1)
    sparse_list = torch.sort(unsorted, dim=-1).values
    weight_list = torch.zeros(b, h, parts.tokens, dtype=dtype, device=device)
    return sparse_list, weight_list.scatter_(-1, sparse_list, 1)


def every_token(query: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The list and the weights of a context too short to choose from."""
    b, h = query.shape[:2]
    sparse_list = torch.arange(tokens, device=query.device).repeat(b, h, 1)
    return sparse_list, query.new_ones(b, h, tokens)
