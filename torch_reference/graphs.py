"""A decode step recorded in a CUDA graph: the form without launch overhead."""

import torch
from torch import Tensor

from torch_reference.indexer import ITERATIONS


class CapturedIndexer:
    """One recorded call of the indexer over fixed tensors; `capture` makes it.

    Write new values into the tensors that were captured, in place, and call `replay`. Sizes,
    the number of keys among them, are those of the capture.

    Attributes:
      outputs: (sparse_list, sparse_len, weight_list, pq_codebook), overwritten by each replay.
    """

    outputs: tuple[Tensor, Tensor, Tensor, Tensor]

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: tuple, outputs: tuple):
        self._graph = graph
        self._inputs = inputs  # the graph reads their memory, so it must not be freed
        self.outputs = outputs

    def replay(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Runs the recorded kernels on the current stream; does not wait for them."""
        self._graph.replay()
        return self.outputs


def capture(name: str, *arguments: Tensor, **options) -> CapturedIndexer:
    """Records one call of a form of the indexer in a CUDA graph.

    The call is made a few times first: values are checked, kernels compiled and tuned then, which
    a recording cannot hold.

    Args:
      name: a name in ITERATIONS.
      arguments: query, keys, pq_centroids and pq_codebook, on the GPU; the recording reads these
        very tensors.
      options: the other arguments of the form.

    Returns:
      The recording; its outputs hold the arguments' result already.

    Raises:
      ValueError: for an unknown name, or what the form itself refuses.
      RuntimeError: without a GPU.
    """
    if name not in ITERATIONS:
        raise ValueError(f"name: expected one of {list(ITERATIONS)}, got {name!r}; name one")
    if not torch.cuda.is_available():
        raise RuntimeError("capture: CUDA graphs need an NVIDIA GPU, and torch sees none")
    form = ITERATIONS[name]
    form(*arguments, **options)
    options["check_values"] = False
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            form(*arguments, **options)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = form(*arguments, **options)
    recording = CapturedIndexer(graph, (arguments, options), outputs)
    recording.replay()
    return recording
