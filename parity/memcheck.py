"""Runs every kernel over odd shapes, for a memory checker to watch.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m parity.memcheck

All shapes take minutes, `--case` is for one of them. With `--plant` a kernel stores past the end
of its output instead, which the checker must report. Arrays come from CUDA's own asynchronous
allocator, whose ends the checker knows to the byte: JAX's pool hides them, and so do the 2 MiB
granules of its "platform" allocator.
"""

import argparse
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from jax_indexer import IndexerConfig, PQIndex, with_cells
from jax_indexer.cells import MOST_NEW, RATE
from jax_indexer.config import MOST_CELLS
from jax_indexer.kernels import backend, centroid_sums, pipeline
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


def run_case(case, interpret: bool) -> None:
    """A decode step kernel by kernel: inside one jit, intermediate arrays share an allocation.

    Outputs are poisoned beforehand and end in a row that no kernel may touch, which finds what
    stays inside of an allocation.
    """
    B, T, N, K, H, S, config = case
    rng = np.random.default_rng(S)
    M, C, augmented = config.num_subspaces, config.num_centroids, config.metric == "ip"
    lengths = rng.integers(max(S // 2, T), S + 1, B).astype(np.int32)
    lengths[0] = S

    def draw(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    with poisoned() as canaries:
        codebooks = draw(B, K, M, C, H // M + augmented)
        key_new, query = draw(B, T, K, H, dtype=jnp.bfloat16), draw(B, T, N, H)
        given = jnp.asarray(rng.integers(0, 256, (B, K, M, S), dtype=np.uint8))
        phi = jnp.full((B, K, M), 9.0, jnp.float32) if augmented else None
        start, taken = jnp.asarray(lengths - T), jnp.full(B, T, jnp.int32)
        options = {"kv_layout": "BSKH", "interpret": interpret}
        # Alone, and as a decode step launches them.
        inputs = key_new, codebooks, given, phi
        alone = pipeline.append_tokens(*inputs, None, start, taken, config, **options).codes
        tables_alone = pipeline.tables_of(query, codebooks, config.table_dtype, interpret=interpret)
        made = pipeline.append_tokens(*inputs, None, start, taken, config, query=query, **options)
        codes, tables = made.codes, made.tables
        jax.tree.map(np.testing.assert_array_equal, (codes, tables), (alone, tables_alone))

        if not centroid_sums.unsupported(C, H // M):
            # One pass of training over what the cache would hold.
            cache = draw(B, S, K, H, dtype=jnp.bfloat16)
            trainable = jnp.arange(S) < jnp.asarray(lengths)[:, None, None, None]
            sums = centroid_sums.centroid_sums(
                cache,
                jnp.broadcast_to(trainable, given.shape),
                codebooks,
                phi,
                jnp.broadcast_to(jnp.asarray(lengths)[:, None, None], (B, K, M)),
                **options,
            )
            np.testing.assert_array_equal(
                np.asarray(sums)[..., -1].sum(-1),
                np.broadcast_to(lengths[:, None, None], (B, K, M)),
            )

        def select(selector: str, weights_dtype):
            sizes = (jnp.asarray(lengths), config, T, N, weights_dtype, selector)
            return pipeline.select_from_tables(tables, codes, *sizes, interpret=interpret)

        for selector in pipeline.SELECTORS:
            indices, counts, weights = select(selector, np.dtype(np.float32))
            np.testing.assert_array_equal((np.asarray(indices) >= 0).sum(-1), counts)
            np.testing.assert_array_equal(np.asarray(weights).sum(-1), counts)
            if case in (CASES[0], CASES[-1]):
                np.testing.assert_array_equal(select(selector, None)[0], indices)

        if T == 1 and config.num_cells <= MOST_CELLS:
            check_cells(config, query, inputs, indices, start, options)
    check_canaries(canaries)


def check_cells(config, query, inputs, indices, start, options) -> None:
    """Selects from cells of rows at every stage of sealing: two steps around each bound.

    What was due before them is left out, so that numbers have no meaning but in the first stage.
    """
    config = dataclasses.replace(config, cells=True)
    key_new, codebooks, codes, phi = inputs
    taken = jnp.ones_like(start)
    index = PQIndex(codebooks, codes, start, phi)
    plan = with_cells(index, config).cells.plan

    def most_waiting(waiting):
        return plan.most_waiting(
            jnp.maximum(start - waiting - plan.margin - plan.first_candidate, 0)
        )

    # A row has as many entries as do not wait.
    done = most_waiting(most_waiting(plan.segment))
    counting = plan.segment - plan.segment // RATE
    bounds = (0, counting, plan.segment, plan.segment + MOST_NEW, done)
    for number, back in enumerate(bounds):  # counting, new starts and reading, writing, sealing
        before = jnp.maximum(start - back, 0)
        cells = with_cells(dataclasses.replace(index, lengths=before), config).cells
        for first in (start - 1, start):  # what is due in both steps is done in one or the other
            made = pipeline.append_tokens(
                key_new, codebooks, codes, phi, cells, jnp.maximum(first, 0), taken, config,
                query=query, weights_dtype=np.dtype(np.float32), **options,
            )  # fmt: skip
            cells, codes = made.cells, made.codes
        lists = pipeline.select_from_cells(
            made.tables, codes, start + 1, cells, config, made.weights,
            interpret=options["interpret"],
        )  # fmt: skip
        if number == 0:
            np.testing.assert_array_equal(lists[0], indices)
            np.testing.assert_array_equal(np.asarray(lists[2]).sum(-1), lists[1])


def run_kernels(cases) -> None:
    interpret = backend.no_gpu() is not None
    for case in cases:
        run_case(case, interpret)
        print(f"checked {case[:-1]}", flush=True)


def overrun_kernel(in_ref, out_ref):
    lane = jnp.arange(256, dtype=jnp.int32)
    backend.store(out_ref.at[lane], in_ref[0] + lane.astype(jnp.float32), mask=lane >= 0)


def run_overrun() -> None:
    (out,) = backend.launch(
        overrun_kernel,
        jnp.ones(100, jnp.float32),
        programs=1,
        out_shape=[jax.ShapeDtypeStruct((128,), np.float32)],
        num_warps=4,
    )
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
    arguments = parser.parse_args()
    if arguments.plant:
        run_overrun()
    else:
        run_kernels(CASES if arguments.case is None else [CASES[arguments.case]])
