"""Steps of PyTorch: the original's iterations, launched kernel by kernel or as CUDA graphs."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.clock import Step
from parity.agreement import Lists, Reference, check_lists, check_top_k, top_k_size
from parity.inputs import Workload


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Blocks until the GPU, if there is one, has done what was launched."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_of(call: Callable[[], Any]) -> int | None:
    """Device memory that a call allocates, at most, beyond what was before; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def tensor(array: np.ndarray) -> Any:
    """A numpy array on torch's device; torch does not know numpy's bfloat16."""
    import torch

    array = np.require(array, requirements=("C", "W"))  # torch warns of what it could write to
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(_device())
    return torch.from_numpy(array).to(_device())


def refused(w: Workload) -> str | None:
    """Why the original cannot do a workload, or None."""
    if w.T != 1:
        return "the original returns the list of the first query token only"
    if w.config.table_dtype != np.float32:
        return f"the original has no {w.config.table_dtype.name} table"
    return None


class Call(NamedTuple):
    """Arguments of one call of the original: batch rows of one length."""

    rows: range  # of the workload
    arguments: tuple  # query, keys, pq_centroids, pq_codebook
    options: dict[str, Any]  # the keywords


@functools.lru_cache(maxsize=1)  # All iterations read the same tensors.
def calls_of(reference: Any, cache: Any = None) -> list[Call]:
    """The calls that make one step: one, or one a row where lengths differ.

    The original has one length for all rows of a batch. Its indexer reads no keys but the new ones,
    so the old ones are zeros, unless there is a cache of all keys [B, K, S, H].

    Args:
      reference: what has a `workload` and its `inputs`.
      cache: of keys, which gets the new ones; the calls read it where it is.
    """
    import torch

    w, inputs, config = reference.workload, reference.inputs, reference.workload.config
    one_length = len(set(w.lengths)) == 1
    groups = [range(w.B)] if one_length else [range(b, b + 1) for b in range(w.B)]
    calls = []
    for rows in groups:
        batch, length = slice(rows.start, rows.stop), w.lengths[rows.start]
        key_new = tensor(inputs.key_new[batch].transpose(0, 2, 1, 3))
        if cache is None:
            shape = (len(rows), w.K, length, w.H)
            keys = torch.zeros(shape, dtype=key_new.dtype, device=key_new.device)
        else:
            keys = cache[batch, :, :length]
        keys[:, :, length - w.T :] = key_new
        quantized = inputs.codes[batch, :, :, config.first_trained : max(length - w.T, 0)]
        arguments = (
            tensor(inputs.query[batch].transpose(0, 2, 1, 3)),
            keys,
            tensor(inputs.codebooks[batch]),
            tensor(quantized).transpose(2, 3).long().contiguous(),
        )
        options = {
            "sink_size": config.sink_size,
            "window_size": config.window_size,
            "heavy_size": config.heavy_size,
            "init_offset": config.first_trained,
            "metric": config.metric,
            "ip2l2_phi": None if inputs.phi is None else tensor(inputs.phi[batch]),
            "check_values": False,
        }
        calls.append(Call(rows, arguments, options))
    return calls


def lists_of(calls: Sequence[Call], found: Sequence[tuple], b: int) -> Lists:
    """The lists of a batch row, from what each call found: lists, lengths and perhaps weights."""
    (number,) = (i for i, call in enumerate(calls) if b in call.rows)
    row = b - calls[number].rows.start
    sparse_list, sparse_len, *weight_list = found[number][:3]
    indices = sparse_list[row].cpu().numpy()
    counts = sparse_len[row].cpu().numpy()
    # What lies past a list's length has no meaning in the original.
    past = np.arange(indices.shape[-1]) >= counts[:, None]
    return Lists(
        indices=np.where(past, -1, indices)[None],
        counts=counts[None],
        weights=weight_list[0][row].float().cpu().numpy().swapaxes(0, 1) if weight_list else None,
    )


class TorchStep(Step):
    """One iteration of the original."""

    def __init__(self, reference: Reference, *, name: str):
        import torch_reference

        self._calls = calls_of(reference)
        self._function = torch_reference.ITERATIONS[name]
        self.numbers = first_calls(self)

    def call(self):
        self._results = [self._function(*call.arguments, **call.options) for call in self._calls]

    def wait(self):
        synchronize()

    def check(self, reference):
        check_lists(reference, functools.partial(lists_of, self._calls, self._results))


class TorchGraphStep(TorchStep):
    """One iteration of the original, replayed as a CUDA graph."""

    def __init__(self, reference: Reference, *, name: str):
        import torch_reference

        def capture() -> None:
            self._graphs = [
                torch_reference.capture(name, *call.arguments, **call.options)
                for call in self._calls
            ]

        self._calls = calls_of(reference)
        start = time.perf_counter()
        memory = memory_of(capture)
        self.numbers = {
            "compile_seconds": time.perf_counter() - start,
            "memory_bytes": memory,
        }
        self._results = [graph.outputs for graph in self._graphs]

    def call(self):
        for graph in self._graphs:
            graph.replay()


class TorchTopK(Step):
    """`torch.topk` alone, the scores given."""

    def __init__(self, reference: Reference):
        self._k = top_k_size(reference.workload)
        self._scores = tensor(reference.candidate_scores)
        self.numbers = first_calls(self)

    def call(self):
        self._results = self._scores.topk(self._k, dim=-1)

    def wait(self):
        synchronize()

    def check(self, reference):
        check_top_k(reference.candidate_scores, *(x.cpu().numpy() for x in self._results))


def first_calls(step: Any) -> dict[str, Any]:
    """What the first call of a step takes to compile and tune, and the memory of another."""
    start = time.perf_counter()
    step.call()
    step.wait()
    seconds = time.perf_counter() - start
    del step._results
    return {"compile_seconds": seconds, "memory_bytes": memory_of(step.call)}


def release() -> None:
    """Frees the tensors that the iterations of a workload share."""
    calls_of.cache_clear()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
