"""Attention over the listed tokens."""

import torch
from torch import Tensor

from torch_reference import checks


def sparse_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sparse_list: Tensor,
    sparse_len: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each query head over its own list, in float32.

    Every query token attends to the whole list, and a token that is listed twice counts twice.

    Args:
      query: float32, bfloat16 or float16 [b, h, sq, d].
      keys: [b, h_kv, sk, d]; h_kv divides h.
      values: [b, h_kv, sk, d_v].
      sparse_list: int64 or int32 [b, h, P], token positions; what is past the length is not read.
      sparse_len: int64 or int32 [b, h], the length of each list.
      scale: of the inner products; d**-0.5 when None.

    Returns:
      [b, h, sq, d_v] in the query's dtype; zeros for an empty list.

    Raises:
      ValueError: naming the argument, what was expected, what came, and what to do.
    """
    checks.attention(query, keys, values, sparse_list, sparse_len)
    checks.full_float32_matmul(query.device)
    b, h, _, d = query.shape
    h_kv = keys.shape[1]
    group = h // h_kv
    listed = sparse_list.shape[-1]
    past = torch.arange(listed, device=query.device) >= sparse_len.unsqueeze(-1)
    token = sparse_list.long().masked_fill(past, 0).view(b, h_kv, group * listed, 1)

    def rows(cache: Tensor) -> Tensor:
        picked = cache.gather(2, token.expand(-1, -1, -1, cache.shape[-1]))
        return picked.view(b, h, listed, -1).float()

    logits = query.float() @ rows(keys).transpose(-1, -2) * (d**-0.5 if scale is None else scale)
    logits = logits.masked_fill(past.unsqueeze(2), float("-inf"))
    # The softmax of an empty list is 0 / 0.
    attended = torch.softmax(logits, dim=-1).masked_fill(past.unsqueeze(2), 0)
    return (attended @ rows(values)).to(query.dtype)
