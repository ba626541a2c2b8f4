"""Steps of JAX: programs traced from shapes alone, and what launches them."""

import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.clock import Step
from jax_indexer import IndexerConfig, PQIndex, Selection, indexer_next, with_cells
from jax_indexer.config import MOST_CELLS, beyond_cells
from parity.agreement import (
    Lists,
    Reference,
    check_lists,
    check_top_k,
    num_candidates,
    top_k_size,
)
from parity.inputs import Inputs, Workload

CHAIN_STEPS = 20

# XLA records kernels as CUDA graphs, and CUPTI gives kernels in them the names of others. What is
# recorded kernel by kernel is therefore the same program without.
NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}


# Programs


class Forms(NamedTuple):
    """Which forms of its programs a run needs."""

    pool: ThreadPoolExecutor  # compiles them; XLA holds no lock of Python's meanwhile
    user: bool = True  # as a user gets them
    recorded: bool = False  # without command buffers
    chains: bool = False  # chains of steps too


def compilers() -> ThreadPoolExecutor:
    """A thread for each core."""
    return ThreadPoolExecutor(os.cpu_count())


class _Compiled(NamedTuple):
    user: jax.stages.Compiled | None
    recorded: jax.stages.Compiled | None
    seconds: float  # of the first of them, beside other programs


def _compiled(lowered: jax.stages.Lowered, forms: Forms) -> _Compiled:
    start = time.perf_counter()
    # JAX keeps this one, and finds it when the jitted function is called.
    user = lowered.compile() if forms.user else None
    between = time.perf_counter()
    recorded = lowered.compile(NO_COMMAND_BUFFERS) if forms.recorded else None
    seconds = (between if forms.user else time.perf_counter()) - start
    return _Compiled(user, recorded, seconds)


class Program:
    """A jitted function that is compiled for one set of shapes, in one form or in two.

    Attributes:
      as_user: calls the program as a user gets it.
    """

    def __init__(
        self,
        forms: Forms,
        function: Callable[..., Any],
        arguments: tuple,
        *,
        donate: str | None = None,
    ):
        """Traces a function of arrays or their shapes, with one donated; a thread compiles it."""
        # A donated array that the function only replaces stays where it is: without it, another
        # output would take its memory, and be copied there.
        self.as_user = jax.jit(function, donate_argnames=donate, keep_unused=True)
        start = time.perf_counter()
        self.lowered = self.as_user.lower(*arguments)
        self._tracing = time.perf_counter() - start
        self._future: Future[_Compiled] = forms.pool.submit(_compiled, self.lowered, forms)

    def wait(self) -> None:
        """Blocks until it is compiled; raises what went wrong."""
        self._future.result()

    @property
    def recorded(self) -> Callable[..., Any]:
        """Calls the program without command buffers, where there is such a form."""
        return self._future.result().recorded or self.as_user

    @property
    def numbers(self) -> dict[str, Any]:
        """Seconds to trace and compile one form; bytes a call needs beside its inputs, if known."""
        compiled = self._future.result()
        memory, needed = (compiled.user or compiled.recorded).memory_analysis(), None
        if memory:
            kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
            needed = memory.temp_size_in_bytes + kept
        return {"compile_seconds": self._tracing + compiled.seconds, "memory_bytes": needed}


Programs = dict[str, Program]


# A decode step


def config_for(w: Workload, selector: str | None) -> IndexerConfig:
    """The workload's, with the state that the selector needs."""
    return dataclasses.replace(w.config, cells=True) if selector == "cells" else w.config


def refused_by_cells(w: Workload) -> str | None:
    """Why "cells" cannot do a workload, or None."""
    config, reason = w.config, beyond_cells(w.config, w.T)
    if not reason and config.num_cells > MOST_CELLS:
        reason = f"up to {MOST_CELLS} cells, not {config.num_centroids}**{config.num_subspaces}"
    return reason and f"takes {reason}"


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


@jax.jit
def digest_of(selection: Selection) -> jax.Array:
    """A number [B, T, N], never negative, that depends on all that a step returns for a head."""
    positions = selection.indices & np.int32(2**31 - 1)
    digest = lax.reduce(positions, np.int32(0), lax.bitwise_xor, (positions.ndim - 1,))
    digest ^= selection.counts
    if selection.weights is not None:
        digest ^= jnp.sum(selection.weights != 0, axis=-1, dtype=jnp.int32)
    return digest


def step_programs(
    w: Workload, forms: Forms, *, implementation: str, selector: str | None
) -> Programs:
    """`indexer_next` under jit, and many of it in a row, with the index donated."""
    config = config_for(w, selector)

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

    # Lists stay inside, as where attention reads them: to return all of them would take longer
    # than to make them.
    def chain(query, keys_new, lengths, index):
        digest = None
        for key_new in keys_new:
            selection, index = traced_once(query, key_new, lengths, index)
            lengths, digest = index.lengths, digest_of(selection)
            # Never true, which XLA cannot know: without it all steps would share one table, and
            # with an optimization_barrier instead they do. It costs a small kernel.
            query = jnp.where(digest[..., None] < 0, jnp.zeros_like(query), query)
        return digest, index

    query, key_new, lengths, index = shapes_of(w, config)
    programs = {"step": Program(forms, step, (query, key_new, lengths, index), donate="index")}
    if forms.chains:
        arguments = (query, (key_new,) * _chain_steps(w), lengths, index)
        once = forms._replace(recorded=False)
        programs["chain"] = Program(once, chain, arguments, donate="index")
    return programs


class JaxStep(Step):
    """`indexer_next` under jit, with the index donated."""

    def __init__(self, reference: Reference, programs: Programs, selector: str | None = None):
        self._workload, inputs = reference.workload, reference.inputs
        self._programs, self._config = programs, config_for(reference.workload, selector)
        self._by_kernels = selector is not None
        self._query = jnp.asarray(inputs.query)
        self._key_new = jnp.asarray(inputs.key_new)
        self._lengths = jnp.asarray(inputs.lengths - np.int32(self._workload.T))
        self._index = index_of(inputs)
        self._index = self._sealed_at(self._lengths)
        self.numbers = programs["step"].numbers

    def _sealed_at(self, lengths: jax.Array) -> PQIndex:
        """The index with the state of rows of these lengths, for a selector that has some."""
        if not self._config.cells:
            return self._index
        index = dataclasses.replace(self._index, lengths=jnp.copy(lengths))
        return with_cells(index, self._config)

    def _launch(self, function: Callable[..., Any]) -> None:
        self.selection, self._index = function(
            self._query, self._key_new, self._lengths, self._index
        )

    def call(self):
        self._launch(self._programs["step"].as_user)

    def call_recorded(self):
        self._launch(self._programs["step"].recorded)

    def wait(self):
        jax.block_until_ready((self.selection, self._index))

    def check(self, reference):
        indices, counts = np.asarray(self.selection.indices), np.asarray(self.selection.counts)

        def lists(b: int) -> Lists:
            weights = self.selection.weights
            if weights is not None:
                weights = np.asarray(weights[b].astype(np.float32))
            return Lists(indices=indices[b], counts=counts[b], weights=weights)

        check_lists(reference, lists)
        _check_lengths(reference, self._index)

    def chain(self):
        if "chain" not in self._programs:
            return None
        steps = _chain_steps(self._workload)
        keys_new = tuple(jnp.array(self._key_new) for _ in range(steps))
        start = self._lengths - np.int32((steps - 1) * self._workload.T)
        index = jax.tree.map(jnp.copy, self._sealed_at(start))  # The step goes on with its own.
        chain = Chain(self._programs["chain"], steps, (self._query, keys_new, start), index)
        chain.expected = digest_of(self.selection)
        # XLA may round a table otherwise in a larger program, and change a few lists at their cut.
        chain.may_differ = 0 if self._by_kernels else chain.expected.size // 10
        return chain


def _check_lengths(reference: Reference, index: PQIndex) -> None:
    expected, lengths = reference.inputs.lengths, np.asarray(index.lengths)
    if not np.array_equal(lengths, expected):
        raise AssertionError(f"index.lengths: expected {expected}, got {lengths}")


class Chain(Step):
    """A jitted function of many decode steps in a row; the last one ends at the workload's L.

    Attributes:
      expected: the digest of the step alone.
      may_differ: how many lists may have another.
    """

    expected: jax.Array
    may_differ: int

    def __init__(self, program: Program, steps: int, arguments: tuple, index: PQIndex):
        self.numbers = {"steps": steps}
        self._program, self._arguments, self._index = program, arguments, index

    def call(self):
        self.digest, self._index = self._program.as_user(*self._arguments, self._index)

    def wait(self):
        jax.block_until_ready((self.digest, self._index))

    def check(self, reference):
        _check_lengths(reference, self._index)
        # The steps before the last wrote other codes than the workload's: harmless in the window.
        w = reference.workload
        if self.numbers["steps"] * w.T > w.config.window_size:
            return
        wrong = np.argwhere(np.asarray(self.digest != self.expected))
        if len(wrong) > self.may_differ:
            b, t, n = wrong[0]
            raise AssertionError(
                f"batch row {b}, query token {t}, head {n}: the last step's list is not that of "
                "the step alone"
            )


# A top-k alone


def top_k_programs(w: Workload, forms: Forms) -> Programs:
    """`jax.lax.top_k` alone."""
    k = top_k_size(w)
    scores = jax.ShapeDtypeStruct((w.B * w.T * w.N, num_candidates(w)), np.float32)
    return {"top_k": Program(forms, lambda scores: lax.top_k(scores, k), (scores,))}


class JaxTopK(Step):
    """`jax.lax.top_k` alone, the scores given."""

    def __init__(self, reference: Reference, programs: Programs):
        self._program = programs["top_k"]
        self._scores = jnp.asarray(reference.candidate_scores)
        self.numbers = self._program.numbers

    def call(self):
        self._found = self._program.as_user(self._scores)

    def call_recorded(self):
        self._found = self._program.recorded(self._scores)

    def wait(self):
        jax.block_until_ready(self._found)

    def check(self, reference):
        check_top_k(reference.candidate_scores, *(np.asarray(x) for x in self._found))
