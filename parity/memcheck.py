"""Runs every kernel over odd shapes, for a memory checker to watch.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m parity.memcheck

All shapes take minutes: `--case` is for one of them, `--check` for some kernels. With `--plant` a
kernel stores past the end of its output instead, which the checker must report. Arrays come from
CUDA's own asynchronous allocator, whose ends the checker knows to the byte: JAX's pool hides them,
and so do the 2 MiB granules of its "platform" allocator.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jax_indexer import IndexerConfig, PQIndex, with_cells
from jax_indexer.config import MOST_CELLS
from jax_indexer.kernels import backend, centroid_sums, pipeline
from jax_indexer.kernels.attend import Entries, launch_listed
from jax_indexer.kernels.step import Step
from jax_indexer.reference import Caches, Logits
from jax_indexer.rope import LookAhead, Rope
from jax_indexer.state import MOST_NEW, RATE, layer_of
from jax_indexer.values import add_values, no_values
from parity.checked_memory import check_canaries, poisoned

# (B, T, N, K, H, S, config): sizes around and between those of blocks.
CASES = (
    (1, 1, 1, 1, 32, 1, IndexerConfig(num_bits=1)),
    (1, 1, 3, 1, 34, 1023, IndexerConfig(heavy_size=16, sink_size=3, window_size=5)),
    (3, 1, 6, 3, 64, 1025, IndexerConfig(num_subspaces=4, num_bits=8, heavy_size=300)),
    (2, 3, 2, 2, 96, 2777, IndexerConfig(num_subspaces=16, num_bits=3, heavy_size=33)),
    (2, 1, 4, 2, 256, 5001, IndexerConfig(num_subspaces=1, num_bits=7, metric="ip")),
    # groups of two sizes
    (1, 1, 3, 1, 64, 270001, IndexerConfig(heavy_size=33)),
    (
        1,
        1,
        4,
        4,
        130,
        40000,
        IndexerConfig(num_subspaces=5, heavy_size=1500, table_dtype="float16"),
    ),
)


@contextlib.contextmanager
def launched_again(canaries: list[jax.Array]) -> Iterator[None]:
    """Inside, a launch like one before it runs the same program.

    Outside of a jit each is traced and compiled anew, and the checker takes seconds to load it.
    """
    programs: dict[Any, Callable] = {}

    def remembered(launch: Callable, name: str, launches: dict[str, backend.Launch], **options):
        arrays, structure = jax.tree.flatten({k: (x.inputs, x.layer) for k, x in launches.items()})
        place = [i for i, x in enumerate(arrays) if not isinstance(x, backend.OutputOf)]
        key = [name, structure, tuple(options.items())]
        key += [x if i not in place else (x.shape, x.dtype) for i, x in enumerate(arrays)]
        for what in launches.values():
            kernel, given = what.kernel, ()
            if isinstance(kernel, functools.partial):
                kernel, given = kernel.func, tuple(kernel.keywords.items())
            outputs, their_structure = jax.tree.flatten(what.outputs)
            shapes = tuple((x.shape, x.dtype) for x in outputs)
            key += [kernel, given, shapes, their_structure, what.programs, what.in_place]
            key += [what.state]

        def program(*taken):
            before, all_arrays = len(canaries), list(arrays)
            for i, x in zip(place, taken, strict=True):
                all_arrays[i] = x
            inner = jax.tree.unflatten(structure, all_arrays)
            found = launch(
                {
                    k: what._replace(inputs=inner[k][0], layer=inner[k][1])
                    for k, what in launches.items()
                },
                **options,
            )
            own = canaries[before:]
            del canaries[before:]
            return found, own

        run = programs.setdefault(tuple(key), jax.jit(program))
        found, own = run(*(arrays[i] for i in place))
        canaries.extend(own)
        return found

    alone, together = backend.launch, backend.launch_together

    def launch(what: backend.Launch, **options: Any) -> Any:
        def one(launches, **options):
            return {"it": alone(launches["it"], **options)}

        return remembered(one, "alone", {"it": what}, **options)["it"]

    def launch_together(launches: Any, **options: Any) -> Any:
        return remembered(together, "together", dict(launches), **options)

    with (
        mock.patch.object(backend, "launch", launch),
        mock.patch.object(backend, "launch_together", launch_together),
    ):
        yield


class Inputs(NamedTuple):
    """What is checked of a case.

    Attributes:
      index: with room for `key_new`.
      query: [B, T, N, H].
      key_new: [B, T, K, H].
      config: without cells.
    """

    index: PQIndex
    query: Any
    key_new: Any
    config: IndexerConfig

    def listed(self) -> Any:
        """The lists of the step, by a selector that needs no cells."""
        _, T, N, _ = self.query.shape
        step = Step.of(self.index, self.config, T=T, N=N)
        return pipeline.launch_step(step, self.query, self.key_new, self.index, None, "threshold")[
            0
        ]


def inputs_of(case) -> Inputs:
    B, T, N, K, H, S, config = case
    rng = np.random.default_rng(S)
    M, C, augmented = config.num_subspaces, config.num_centroids, config.metric == "ip"
    lengths = rng.integers(max(S // 2, T), S + 1, B).astype(np.int32)
    lengths[0] = S

    def draw(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    index = PQIndex(
        codebooks=draw(B, K, M, C, H // M + augmented),
        codes=jnp.asarray(rng.integers(0, 256, (B, K, M, S), dtype=np.uint8)),
        lengths=jnp.asarray(lengths - T),
        phi=jnp.full((B, K, M), 9.0, jnp.float32) if augmented else None,
    )
    return Inputs(index, draw(B, T, N, H), draw(B, T, K, H, dtype=jnp.bfloat16), config)


def check_step(inputs: Inputs) -> None:
    """Both selectors, after an append in the same launch and after one alone."""
    index, query, key_new, config = inputs
    _, T, N, _ = query.shape
    step = Step.of(index, config, T=T, N=N, weights_dtype=np.dtype(np.float32))
    bare = dataclasses.replace(step, weights_dtype=None)
    alone = pipeline.launch_append(step, key_new, index, None)
    for selector in ("threshold", "top_k"):
        lists, after = pipeline.launch_step(step, query, key_new, index, None, selector)
        np.testing.assert_array_equal(after.codes, alone.codes)
        np.testing.assert_array_equal((np.asarray(lists.indices) >= 0).sum(-1), lists.counts)
        np.testing.assert_array_equal(np.asarray(lists.weights).sum(-1), lists.counts)
        again = pipeline.launch_select(bare, query, alone, None, selector)
        np.testing.assert_array_equal(again.indices, lists.indices)


def check_training(inputs: Inputs) -> None:
    """One pass over what the cache would hold."""
    index = inputs.index
    B, K, M, S = index.codes.shape
    shape = B, S, K, inputs.query.shape[3]
    cache = jnp.asarray(np.random.default_rng(S).standard_normal(shape), jnp.bfloat16)
    of_rows = index.lengths[:, None, None]
    trainable = jnp.broadcast_to(jnp.arange(S)[None, None, None] < of_rows[..., None], (B, K, M, S))
    ahead = LookAhead(Rope.from_base(1e4, shape[3]), horizon=1000, copies=2)
    sums, nearest = centroid_sums.centroid_sums(
        cache,
        trainable,
        index.codebooks,
        index.codebooks[..., 0, :],
        index.phi,
        jnp.broadcast_to(of_rows, (B, K, M)),
        index.lengths,
        jnp.ones(B, jnp.int32),
        kv_layout="BSKH",
        grouping=inputs.config.grouping,
        ahead=ahead,
    )
    want = np.broadcast_to((1 + ahead.copies) * of_rows, (B, K, M))
    np.testing.assert_array_equal(np.asarray(sums)[..., -1].sum(-1), want)
    found = np.moveaxis(np.asarray(nearest), 3, -1)[np.asarray(trainable)]
    assert (found < index.codebooks.shape[3]).all()


def check_cells(inputs: Inputs) -> None:
    """Selects from cells of rows at every stage of sealing: two steps around each bound.

    What was due before them is left out, so that numbers have no meaning but in the first stage.
    """
    index, query, key_new, config = inputs
    config = dataclasses.replace(config, cells=True)
    start, sealing = index.lengths, with_cells(index, config).cells.sealing
    step = Step.of(index, config, N=query.shape[2], weights_dtype=np.dtype(np.float32))

    def most_waiting(waiting):
        entries = start - waiting - sealing.margin - sealing.first_candidate
        return sealing.most_waiting(jnp.maximum(entries, 0))

    # A row has as many entries as do not wait.
    done = most_waiting(most_waiting(sealing.segment))
    counting = sealing.segment - sealing.segment // RATE
    bounds = (0, counting, sealing.segment, sealing.segment + MOST_NEW, done)
    for number, back in enumerate(bounds):  # counting, new starts and reading, writing, sealing
        before = dataclasses.replace(index, lengths=jnp.maximum(start - back, 0))
        now = dataclasses.replace(index, cells=with_cells(before, config).cells)
        for first in (start - 1, start):  # what is due in both steps is done in one or the other
            lengths = jnp.maximum(first, 0)
            now = dataclasses.replace(now, lengths=lengths, high_water=lengths)
            got, now = pipeline.launch_step(step, query, key_new, now, None, "cells")
        if number == 0:
            np.testing.assert_array_equal(got.indices, inputs.listed().indices)
            np.testing.assert_array_equal(np.asarray(got.weights).sum(-1), got.counts)


def check_attention(inputs: Inputs) -> None:
    """A whole layer's step, in the last of two layers."""
    index, query, key_new, config = inputs
    (B, T, N, H), (_, K, _, S) = query.shape, index.codes.shape
    of_value = H // 2 + 1
    rng = np.random.default_rng(S)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    new = Caches(key_new, draw(B, T, K, of_value))
    caches = Caches(draw(B, S, K, H), draw(B, S, K, of_value))
    logits = Logits(jnp.float32(H**-0.5), jnp.float32(20))
    want = None
    layer, counts = jnp.int32(1), jnp.full(B, T, jnp.int32)
    for selector in ("threshold", "cells") if has_cells(T, config) else ("threshold",):
        its_config, state = config, index
        if selector == "cells":
            its_config = dataclasses.replace(config, cells=True)
            state = with_cells(index, its_config)
        before = jax.tree.map(lambda x: jnp.stack([x, x]), (state, caches))
        step = Step.of(before[0], its_config, T=T, N=N)
        arguments = query, new, before[1], before[0], None, counts, logits, selector
        out, written, *_ = pipeline.launch_decode(step, *arguments, layer)
        if want is None:
            listed = query, layer_of(written, layer), inputs.listed().indices, logits, None, "BSKH"
            want = np.asarray(launch_listed(*listed).output.out)
            assert np.isfinite(want).all()
            shared = launch_listed(*listed, own=Entries.of(config)).output.out
            np.testing.assert_allclose(shared, want, rtol=1e-4, atol=1e-4)
        # The same numbers in another order.
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
        length = int(index.lengths[0])
        for one, other in zip(layer_of(written, layer), new, strict=True):
            np.testing.assert_array_equal(one[0, length : length + T], other[0])


def check_pool(inputs: Inputs) -> None:
    """A pool's winners and the rest, in the last of two layers: what values of one number give."""
    index, query, key_new, config = inputs
    (B, T, N, H), (_, K, _, S) = query.shape, index.codes.shape
    of_value, cache = H // 2 + 1, jnp.bfloat16
    new = Caches(key_new, jnp.ones((B, T, K, of_value), cache))
    key = jnp.asarray(np.random.default_rng(S).standard_normal((B, S, K, H)), cache)
    caches = Caches(key, jnp.ones((B, S, K, of_value), cache))
    logits = Logits(jnp.float32(H**-0.5), jnp.float32(20))
    layer, counts = jnp.int32(1), jnp.full(B, T, jnp.int32)
    for selector in ("threshold", "cells") if has_cells(T, config) else ("threshold",):
        uses_cells = selector == "cells"
        rest = "codes" if uses_cells else "mean"
        its_config = dataclasses.replace(config, cells=uses_cells, rerank=3, estimate_rest=rest)
        state = with_cells(index, its_config) if uses_cells else index
        nothing = jnp.zeros(B, jnp.int32)
        values = no_values(B, K, of_value, its_config)
        # As by many tokens at once: XLA's own scatter of a few reads past its indices.
        grown = nothing, index.lengths, max(S, MOST_NEW + 1)
        values = add_values(values, caches.value, index.codes, *grown, its_config, "BSKH", None)
        state = dataclasses.replace(state, values=values, high_water=index.lengths)
        before = jax.tree.map(lambda x: jnp.stack([x, x]), (state, caches))
        step = Step.of(before[0], its_config, T=T, N=N)
        arguments = query, new, before[1], before[0], None, counts, logits, selector
        out, _, after, _ = pipeline.launch_decode(step, *arguments, layer)
        np.testing.assert_allclose(out, np.ones_like(out), rtol=1e-3)
        values = layer_of(after.values, layer)
        per_code = values.counts[..., None].astype(jnp.float32)
        np.testing.assert_array_equal(values.sums, jnp.broadcast_to(per_code, values.sums.shape))


def has_cells(T: int, config: IndexerConfig) -> bool:
    return T <= MOST_NEW and config.num_cells <= MOST_CELLS


CHECKS = {
    "step": check_step,
    "training": check_training,
    "cells": check_cells,
    "attention": check_attention,
    "pool": check_pool,
}


def checks_of(case) -> list[str]:
    """What there is to check."""
    _, T, _, _, H, _, config = case
    missing = set()
    if centroid_sums.unsupported(config.num_centroids, H // config.num_subspaces):
        missing.add("training")
    if not has_cells(T, config):
        missing.add("cells")
    return [name for name in CHECKS if name not in missing]


def run_case(case, names: Sequence[str]) -> None:
    """Kernel by kernel: inside one jit, intermediate arrays share an allocation.

    Outputs are poisoned beforehand and end in a row that no kernel may touch, which finds what
    stays inside of an allocation.
    """
    on_cpu = backend.no_gpu() is not None
    with contextlib.ExitStack() as stack:
        if on_cpu:
            stack.enter_context(backend.interpreted())
        canaries = stack.enter_context(poisoned())
        stack.enter_context(launched_again(canaries))
        inputs = inputs_of(case)
        for name in names:
            CHECKS[name](inputs)
            print(f"checked {name} of {case[:-1]}", flush=True)
    check_canaries(canaries)


class Numbers(NamedTuple):
    """Some numbers."""

    x: Any


def overrun_kernel(program, inputs: Numbers, outputs: Numbers):
    del program
    lane = jnp.arange(256, dtype=jnp.int32)
    backend.store(outputs.x.at[lane], inputs.x[0] + lane.astype(jnp.float32), mask=lane >= 0)


def run_overrun() -> None:
    inputs = Numbers(jnp.ones(100, jnp.float32))
    outputs = Numbers(jax.ShapeDtypeStruct((128,), np.float32))
    what = backend.Launch(overrun_kernel, inputs, outputs, programs=1)
    out = backend.launch(what, num_warps=4)
    print("checked the planted overrun", flush=True)
    jax.block_until_ready(out)


def make_allocations_visible() -> None:
    """Takes effect before JAX first touches the GPU."""
    os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "cuda_async"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # A captured graph would keep its buffers in one allocation.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="


if __name__ == "__main__":
    make_allocations_visible()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--case", type=int, choices=range(len(CASES)), help="default: all")
    group.add_argument("--plant", action="store_true", help="store past the end of an output")
    parser.add_argument("--check", choices=CHECKS, help="default: all")
    arguments = parser.parse_args()
    if arguments.plant:
        run_overrun()
    else:
        for case in CASES if arguments.case is None else [CASES[arguments.case]]:
            names = checks_of(case)
            run_case(case, [x for x in names if arguments.check in (None, x)])
