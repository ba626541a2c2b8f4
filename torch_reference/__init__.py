"""The PyTorch/Triton indexer that this project is measured against, by tuning iteration.

`ITERATIONS` maps a name to a decode step: `"eager"`, plain PyTorch, and `"iteration1"` to
`"iteration4"`, where Triton kernels take over the scoring and, in the last, the list. All compute
the same, in the letters of the original: `[b, h, s, d]` tensors and int64 lists. Credit: PQCache
(arXiv 2407.12820) for the method, sparse-attention-hub (skylight-org) for the tuned indexer.

What the original does oddly is kept, because it is the thing compared with:

* Candidates are every token from `init_offset` on. When fewer than `heavy_size` of them lie before
  the window, `torch.topk` picks masked (-inf) entries: window tokens that are listed twice.
* With `sink_size > init_offset` a sink token can be chosen by score too: listed twice. Where sink
  and window overlap, the shared tokens are listed twice.
* Which of several equal scores is taken is left to `torch.topk`.
* Of several query tokens (`sq > 1`) only the first one's list is returned, it serves them all, and
  the window ends at the last key for each of them: no causal mask.
"""

import os
import sys

import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    # Triton's own library is decorated while triton is imported, so its interpreter has to be
    # chosen before that.
    if "triton" in sys.modules:
        raise ImportError(
            "torch_reference: without a GPU its kernels need Triton's interpreter, and triton was "
            "imported before it could be chosen; import torch_reference first"
        )
    os.environ["TRITON_INTERPRET"] = "1"

from torch_reference.attention import sparse_attention
from torch_reference.graphs import CapturedIndexer, capture
from torch_reference.indexer import ITERATIONS
from torch_reference.kmeans import indexer_first

__all__ = ["ITERATIONS", "CapturedIndexer", "capture", "indexer_first", "sparse_attention"]
