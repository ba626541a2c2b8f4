"""What is measured, by name: every implementation as a step that can be launched and waited for."""

import dataclasses
import functools
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.agreement import Lists, Reference, check_lists, check_top_k
from benchmarks.ceilings import Work, step_work, top_k_work
from benchmarks.programs import Forms, Program
from jax_indexer import IndexerConfig, PQIndex, Selection, indexer_next, with_cells
from jax_indexer.config import MOST_CELLS
from parity.inputs import Inputs, Workload

CHAIN_STEPS = 20


class Step:
    """One implementation on one workload, ready to be called again and again.

    Attributes:
      compile_seconds: to trace, compile and tune.
      memory_bytes: that a call needs beside its inputs, at most; None if not known.
    """

    compile_seconds: float
    memory_bytes: int | None = None

    def call(self) -> None:
        """Launches one call, as a user does."""
        raise NotImplementedError

    def call_recorded(self) -> None:
        """Launches the same kernels in a way that a profiler names right."""
        self.call()

    def wait(self) -> None:
        """Blocks until the device has done what was launched."""
        raise NotImplementedError

    def check(self, reference: Reference) -> None:
        """Raises AssertionError unless the latest call's outputs are right."""
        raise NotImplementedError

    def chain(self) -> "Chain | None":
        """The same step many times inside one jit, or None."""
        return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A name of the command line.

    Attributes:
      name: "framework:form", or a library function's own name.
      framework: "jax" or "torch".
      build: makes the step from inputs and from what `programs` gave.
      bytes_needed: least device memory for its inputs, outputs and scores.
      programs: starts to compile what the step needs; None where nothing can be compiled before.
      work: least work of a call.
      needs_gpu: whether there is nothing to run without one.
      peer: whether it is a top-k alone, given scores.
      pipeline: whether it is one of our own pipelines, which are measured most often.
      refuses: says why it cannot do a workload, or None.
    """

    name: str
    framework: str
    build: Callable[[Reference, "Programs"], Step]
    bytes_needed: Callable[[Workload], int]
    programs: Callable[[Workload, "Forms"], "Programs"] | None = None
    work: Callable[[Workload], Work] = step_work
    needs_gpu: bool = True
    peer: bool = False
    pipeline: bool = False
    refuses: Callable[[Workload], str | None] = lambda w: None


Programs = dict[str, Program]


# JAX


def _config_for(w: Workload, selector: str | None) -> IndexerConfig:
    """The workload's, with the state that the selector needs."""
    return dataclasses.replace(w.config, cells=True) if selector == "cells" else w.config


def _no_cells(w: Workload) -> str | None:
    """Why "cells" cannot do a workload, or None."""
    if w.T > 1:
        return f"takes one query token, not T={w.T}"
    if w.config.num_cells > MOST_CELLS:
        return f"takes up to {MOST_CELLS} cells, not {w.config.num_centroids}**" + str(
            w.config.num_subspaces
        )
    return None


def shapes_of(w: Workload, config: IndexerConfig) -> tuple[Any, Any, Any, PQIndex]:
    """Shapes of a step's query, new keys, lengths and index."""
    dtype = jnp.dtype(w.dtype)
    heads = (w.B, w.K, config.num_subspaces)
    augmented = config.metric == "ip"
    lengths = jax.ShapeDtypeStruct((w.B,), np.int32)
    dimensions = w.H // config.num_subspaces + augmented
    trained = np.float32 if w.sample else dtype  # by build_index
    index = PQIndex(
        codebooks=jax.ShapeDtypeStruct((*heads, config.num_centroids, dimensions), trained),
        codes=jax.ShapeDtypeStruct((*heads, w.capacity), np.uint8),
        lengths=lengths,
        phi=jax.ShapeDtypeStruct(heads, np.float32) if augmented else None,
    )
    if config.cells:
        index = jax.eval_shape(lambda index: with_cells(index, config), index)
    query = jax.ShapeDtypeStruct((w.B, w.T, w.N, w.H), dtype)
    key_new = jax.ShapeDtypeStruct((w.B, w.T, w.K, w.H), dtype)
    return query, key_new, lengths, index


def index_of(inputs: Inputs) -> PQIndex:
    """The index of a step; copies, since donated memory must not be numpy's."""
    return PQIndex(
        codebooks=jnp.array(inputs.codebooks),
        codes=jnp.array(inputs.codes),
        lengths=jnp.array(inputs.lengths),
        phi=None if inputs.phi is None else jnp.array(inputs.phi),
    )


def _chain_steps(w: Workload) -> int:
    return min(CHAIN_STEPS, min(w.lengths) // w.T)


def jax_programs(
    w: Workload, forms: Forms, *, implementation: str, selector: str | None
) -> Programs:
    """`indexer_next` under jit, and many of it in a row, with the index donated."""
    config = _config_for(w, selector)

    # The step's index arrives with the length it left; every call starts at L - T by taking this
    # array instead, which costs no kernel.
    def step(query, key_new, lengths, index):
        return indexer_next(
            query,
            key_new,
            dataclasses.replace(index, lengths=lengths),
            config=config,
            return_weights=w.weights,
            implementation=implementation,
            selector=selector,
        )

    traced_once = jax.jit(step)

    def chain(query, keys_new, lengths, index):
        selections = []
        for key_new in keys_new:
            selection, index = traced_once(query, key_new, lengths, index)
            lengths = index.lengths
            selections.append(selection)
            # Never true, which XLA cannot know: without it all steps would share one table, and
            # with an optimization_barrier instead they do. It costs a small kernel.
            impossible = selection.indices[..., :1] < -1
            query = jnp.where(impossible, jnp.zeros_like(query), query)
        return selections, index

    query, key_new, lengths, index = shapes_of(w, config)
    programs = {"step": Program(forms, step, (query, key_new, lengths, index), donate="index")}
    if forms.chains:
        keys_new = (key_new,) * _chain_steps(w)
        arguments = (query, keys_new, lengths, index)
        once = dataclasses.replace(forms, recorded=False)
        programs["chain"] = Program(once, chain, arguments, donate="index")
    return programs


class JaxStep(Step):
    """`indexer_next` under jit, with the index donated."""

    def __init__(self, reference: Reference, programs: Programs, selector: str | None = None):
        self._workload, inputs = reference.workload, reference.inputs
        self._programs, self._config = programs, _config_for(reference.workload, selector)
        self._query = jnp.asarray(inputs.query)
        self._key_new = jnp.asarray(inputs.key_new)
        self._lengths = jnp.asarray(inputs.lengths - np.int32(self._workload.T))
        self._index = index_of(inputs)
        self._index = self._sealed_at(self._lengths)
        self.compile_seconds = programs["step"].seconds
        self.memory_bytes = programs["step"].memory_bytes

    def _sealed_at(self, lengths: jax.Array) -> PQIndex:
        """The index with the state of rows of these lengths, for a selector that has some."""
        if not self._config.cells:
            return self._index
        index = dataclasses.replace(self._index, lengths=jnp.copy(lengths))
        return with_cells(index, self._config)

    def _launch(self, function: Callable[..., Any]) -> None:
        self._selection, self._index = function(
            self._query, self._key_new, self._lengths, self._index
        )

    def call(self):
        self._launch(self._programs["step"].as_user)

    def call_recorded(self):
        self._launch(self._programs["step"].recorded)

    def wait(self):
        jax.block_until_ready((self._selection, self._index))

    def check(self, reference):
        check_jax(reference, self._selection, self._index)

    def chain(self):
        if "chain" not in self._programs:
            return None
        w = self._workload
        steps = _chain_steps(w)
        keys_new = tuple(jnp.array(self._key_new) for _ in range(steps))
        start = self._lengths - np.int32((steps - 1) * w.T)
        arguments = (self._query, keys_new, start)
        return Chain(self._programs["chain"], steps, arguments, self._sealed_at(start))


class Chain(Step):
    """A jitted function of many decode steps in a row; the last one ends at the workload's L."""

    def __init__(self, program: Program, steps: int, arguments: tuple, index: PQIndex):
        self.steps = steps
        self.compile_seconds = program.seconds
        self._program, self._arguments = program, arguments
        self._index = jax.tree.map(jnp.copy, index)  # The step goes on with its own.

    def call(self):
        self._selections, self._index = self._program.as_user(*self._arguments, self._index)

    def wait(self):
        jax.block_until_ready((self._selections, self._index))

    def check(self, reference):
        # The steps before the last wrote other codes than the workload's: harmless in the window.
        w = reference.workload
        if self.steps * w.T <= w.config.window_size:
            check_jax(reference, self._selections[-1], self._index)


def check_jax(reference: Reference, selection: Selection, index: PQIndex) -> None:
    """Raises AssertionError unless a decode step of ours returned what it should."""
    indices, counts = np.asarray(selection.indices), np.asarray(selection.counts)

    def lists(b: int) -> Lists:
        weights = selection.weights
        if weights is not None:
            weights = np.asarray(weights[b].astype(np.float32))
        return Lists(indices=indices[b], counts=counts[b], weights=weights)

    check_lists(reference, lists)
    expected, lengths = reference.inputs.lengths, np.asarray(index.lengths)
    if not np.array_equal(lengths, expected):
        raise AssertionError(f"index.lengths: expected {expected}, got {lengths}")


def top_k_programs(w: Workload, forms: Forms) -> Programs:
    """`jax.lax.top_k` alone."""
    k = _top_k_size(w)
    scores = jax.ShapeDtypeStruct((w.B * w.T * w.N, _candidates(w)), np.float32)
    return {"top_k": Program(forms, lambda scores: lax.top_k(scores, k), (scores,))}


class JaxTopK(Step):
    """`jax.lax.top_k` alone, the scores given."""

    def __init__(self, reference: Reference, programs: Programs):
        self._program = programs["top_k"]
        self._scores = jnp.asarray(reference.candidate_scores)
        self.compile_seconds = self._program.seconds
        self.memory_bytes = self._program.memory_bytes

    def call(self):
        self._found = self._program.as_user(self._scores)

    def call_recorded(self):
        self._found = self._program.recorded(self._scores)

    def wait(self):
        jax.block_until_ready(self._found)

    def check(self, reference):
        check_top_k(reference.candidate_scores, *(np.asarray(x) for x in self._found))


# PyTorch


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class TorchMemory:
    """Device memory that was allocated inside a `with`, at most, beyond what was before."""

    def __enter__(self):
        import torch

        self.bytes = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_):
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before


def _tensor(array: np.ndarray) -> Any:
    """A numpy array on torch's device; torch does not know numpy's bfloat16."""
    import torch

    array = np.require(array, requirements=("C", "W"))  # torch warns of what it could write to
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(_device())
    return torch.from_numpy(array).to(_device())


@dataclasses.dataclass(frozen=True)
class TorchCall:
    """Arguments of one call of the original: batch rows of one length.

    Attributes:
      rows: which batch rows of the workload.
      arguments: query, keys, pq_centroids, pq_codebook.
      options: the keywords.
    """

    rows: range
    arguments: tuple
    options: dict[str, Any]


@functools.lru_cache(maxsize=1)  # All iterations read the same tensors.
def _torch_calls(reference: Reference) -> list[TorchCall]:
    """The calls that make one step: one, or one a row where lengths differ.

    The original has one length for all rows of a batch. It reads no keys but the new ones, so the
    old ones are zeros.
    """
    import torch

    w, inputs, config = reference.workload, reference.inputs, reference.workload.config
    if w.T != 1:
        raise NotImplementedError("the original returns the list of the first query token only")
    if config.table_dtype != np.float32:
        raise NotImplementedError(f"the original has no {config.table_dtype.name} table")
    one_length = len(set(w.lengths)) == 1
    groups = [range(w.B)] if one_length else [range(b, b + 1) for b in range(w.B)]
    calls = []
    for rows in groups:
        batch, length = slice(rows.start, rows.stop), w.lengths[rows.start]
        key_new = _tensor(inputs.key_new[batch].transpose(0, 2, 1, 3))
        keys = torch.zeros(
            (len(rows), w.K, length, w.H), dtype=key_new.dtype, device=key_new.device
        )
        keys[:, :, length - w.T :] = key_new
        quantized = inputs.codes[batch, :, :, config.first_trained : max(length - w.T, 0)]
        codebook = _tensor(quantized).transpose(2, 3).long().contiguous()
        calls.append(
            TorchCall(
                rows,
                (
                    _tensor(inputs.query[batch].transpose(0, 2, 1, 3)),
                    keys,
                    _tensor(inputs.codebooks[batch]),
                    codebook,
                ),
                {
                    "sink_size": config.sink_size,
                    "window_size": config.window_size,
                    "heavy_size": config.heavy_size,
                    "init_offset": config.first_trained,
                    "metric": config.metric,
                    "ip2l2_phi": None if inputs.phi is None else _tensor(inputs.phi[batch]),
                    "check_values": False,
                },
            )
        )
    return calls


def release() -> None:
    """Frees what the implementations of a workload share, and what their frameworks keep."""
    _torch_calls.cache_clear()
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class TorchStep(Step):
    """One iteration of the original."""

    def __init__(self, reference: Reference, programs: Programs, *, name: str):
        import torch_reference

        self._calls = _torch_calls(reference)
        self._function = torch_reference.ITERATIONS[name]
        start = time.perf_counter()
        self.call()
        self.wait()
        self.compile_seconds = time.perf_counter() - start
        del self._results
        with TorchMemory() as memory:
            self.call()
        self.memory_bytes = memory.bytes

    def call(self):
        self._results = [self._function(*call.arguments, **call.options) for call in self._calls]

    def wait(self):
        _synchronize()

    def check(self, reference):
        def lists(b: int) -> Lists:
            (number,) = (i for i, call in enumerate(self._calls) if b in call.rows)
            row = b - self._calls[number].rows.start
            sparse_list, sparse_len, weight_list, _ = self._results[number]
            indices = sparse_list[row].cpu().numpy()
            counts = sparse_len[row].cpu().numpy()
            # What lies past a list's length has no meaning in the original.
            past = np.arange(indices.shape[-1]) >= counts[:, None]
            return Lists(
                indices=np.where(past, -1, indices)[None],
                counts=counts[None],
                weights=weight_list[row].float().cpu().numpy().swapaxes(0, 1),
            )

        check_lists(reference, lists)


class TorchGraphStep(TorchStep):
    """One iteration of the original, replayed as a CUDA graph."""

    def __init__(self, reference: Reference, programs: Programs, *, name: str):
        import torch_reference

        self._calls = _torch_calls(reference)
        start = time.perf_counter()
        with TorchMemory() as memory:
            self._graphs = [
                torch_reference.capture(name, *call.arguments, **call.options)
                for call in self._calls
            ]
        self.compile_seconds = time.perf_counter() - start
        self.memory_bytes = memory.bytes
        self._results = [graph.outputs for graph in self._graphs]

    def call(self):
        for graph in self._graphs:
            graph.replay()


class TorchTopK(Step):
    """`torch.topk` alone, the scores given."""

    def __init__(self, reference: Reference, programs: Programs):
        self._scores = _tensor(reference.candidate_scores)
        self._k = _top_k_size(reference.workload)
        start = time.perf_counter()
        self.call()
        self.wait()
        self.compile_seconds = time.perf_counter() - start
        del self._found
        with TorchMemory() as memory:
            self.call()
        self.memory_bytes = memory.bytes

    def call(self):
        self._found = self._scores.topk(self._k, dim=-1)

    def wait(self):
        _synchronize()

    def check(self, reference):
        check_top_k(reference.candidate_scores, *(x.cpu().numpy() for x in self._found))


# Names


def _candidates(w: Workload) -> int:
    return max(max(w.lengths) - w.config.window_size - w.config.first_candidate, 0)


def _top_k_size(w: Workload) -> int:
    size = min(w.config.heavy_size, _candidates(w))
    if size == 0:
        raise NotImplementedError("a budget or a context without anything to choose")
    return size


def _outputs_bytes(w: Workload, tokens: int) -> int:
    queries = w.B * w.T * w.N
    return queries * (tokens * jnp.dtype(w.dtype).itemsize + 4 * w.config.max_selected(w.T))


def _jax_bytes(w: Workload) -> int:
    codes = w.B * w.K * w.config.num_subspaces * w.capacity
    return codes + _outputs_bytes(w, w.capacity if w.weights else 0)


def _torch_bytes(w: Workload) -> int:
    tokens = sum(w.lengths)
    keys = w.K * w.H * tokens * jnp.dtype(w.dtype).itemsize
    codebooks = 2 * 8 * w.K * w.config.num_subspaces * tokens  # int64, and a longer copy
    scores = 4 * w.N * tokens
    return keys + codebooks + scores + _outputs_bytes(w, max(w.lengths))


def _peer_bytes(w: Workload) -> int:
    return 4 * w.B * w.T * w.N * _candidates(w)


def _peer_work(w: Workload) -> Work:
    return top_k_work(w.B * w.T * w.N, _candidates(w), _top_k_size(w))


def _jax(name: str, implementation: str, selector: str | None, *, pipeline: bool = True):
    programs = functools.partial(jax_programs, implementation=implementation, selector=selector)
    build = functools.partial(JaxStep, selector=selector)
    return Implementation(
        f"jax:{name}",
        "jax",
        build,
        _jax_bytes,
        programs,
        needs_gpu=pipeline,
        pipeline=pipeline,
        refuses=_no_cells if selector == "cells" else lambda w: None,
    )


def _torch(name: str, *, needs_gpu=True):
    build = functools.partial(TorchStep, name=name)
    return Implementation(f"torch:{name}", "torch", build, _torch_bytes, needs_gpu=needs_gpu)


def _torch_graph(name: str):
    build = functools.partial(TorchGraphStep, name=name)
    return Implementation(f"torch:{name}-graph", "torch", build, _torch_bytes)


def _peer(name: str, framework: str, build: Callable[[Reference, Programs], Step], programs=None):
    return Implementation(
        name, framework, build, _peer_bytes, programs, _peer_work, needs_gpu=False, peer=True
    )


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        _jax("cells", "triton", "cells"),
        _jax("threshold", "triton", "threshold"),
        _jax("top_k", "triton", "top_k"),
        _jax("xla", "xla", None, pipeline=False),
        _torch("eager", needs_gpu=False),
        _torch_graph("eager"),
        _torch("iteration1"),
        _torch("iteration2"),
        _torch("iteration3"),
        _torch("iteration4"),
        _torch_graph("iteration4"),
        _peer("jax.lax.top_k", "jax", JaxTopK, top_k_programs),
        _peer("torch.topk", "torch", TorchTopK),
    )
}
