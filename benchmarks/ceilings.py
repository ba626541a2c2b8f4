"""What the GPU can do at best, measured in the same run, and the floor of a workload from it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import KernelClock, Stream, cut
from benchmarks.jax_steps import NO_COMMAND_BUFFERS
from jax_indexer.kernels import backend
from parity.agreement import num_candidates, top_k_size
from parity.inputs import Workload

COPY_BYTES = 2**30
REPEATS = 20
TABLE_DTYPES = ("float32", "bfloat16", "float16")

# The look-up kernel: tables of 16 subspaces with 256 centroids fit into L1, like those of the
# finest workload, and random codes meet the banks as real ones do.
SUBSPACES = 16
CENTROIDS = 256
LOOKUP_BLOCK = 1024
LOOKUP_PROGRAMS = 4096
LOOKUPS_PER_CODE = 64


class Ceilings(NamedTuple):
    """Best rates of one GPU."""

    copy_bytes_per_second: float  # of a large copy, read and written together
    lookups_per_second: dict[str, float]  # of a table in L1 by random codes, for each dtype of it
    kernel_us: float  # of the smallest kernel


class Work(NamedTuple):
    """The least that one call must do, if it looks at every candidate's codes once."""

    bytes: int  # between device memory and the chip
    lookups: int  # of table entries
    table_dtype: str = "float32"


class Lookups(NamedTuple):
    """Look-ups of codes in a table."""

    table: Any  # [SUBSPACES * CENTROIDS, G]
    codes: Any  # i32[programs * block]


class Sums(NamedTuple):
    """Sums of what was found."""

    total: Any  # f32[programs * block]


def lookup_kernel(program, inputs: Lookups, outputs: Sums, *, lookups: int):
    table = inputs.table
    position = program * LOOKUP_BLOCK + jnp.arange(LOOKUP_BLOCK, dtype=jnp.int32)
    code = inputs.codes[position]
    together = table.shape[1]
    column = jnp.arange(together, dtype=jnp.int32)[None, :]
    total = jnp.zeros((LOOKUP_BLOCK, together) if together > 1 else LOOKUP_BLOCK, jnp.float32)
    for i in range(lookups):
        # Another shift for every look-up, or the compiler would reuse what it loaded.
        entry = i % SUBSPACES * CENTROIDS + ((code + 37 * i) & (CENTROIDS - 1))
        found = table[entry[:, None], column] if together > 1 else table[entry, 0]
        total += found.astype(jnp.float32)
    outputs.total[position] = jnp.sum(total, axis=1) if together > 1 else total


def sum_of_lookups(
    table: jax.Array, codes: jax.Array, *, lookups: int = LOOKUPS_PER_CODE
) -> jax.Array:
    """Sums so many rows of a table for each code, whose entries are read by one load.

    Args:
      table: [SUBSPACES * CENTROIDS, G].
      codes: int32[programs * LOOKUP_BLOCK]; the sums are float32 of the same shape.
      lookups: rows a code.
    """
    what = backend.Launch(
        functools.partial(lookup_kernel, lookups=lookups),
        Lookups(table, codes),
        Sums(jax.ShapeDtypeStruct(codes.shape, np.float32)),
        programs=codes.shape[0] // LOOKUP_BLOCK,
    )
    return backend.launch(what, num_warps=4).total


def _kernel_us(clock: KernelClock, function, *arguments) -> float:
    """Best kernel time of a jitted function, in microseconds."""
    compiled = jax.jit(function).lower(*arguments).compile(compiler_options=NO_COMMAND_BUFFERS)
    found = None

    def launch():
        nonlocal found
        found = compiled(*arguments)

    stream = Stream(launch, lambda: jax.block_until_ready(found), "jax", REPEATS)
    (kernels,) = clock.record([stream], cold=False)
    return min(
        sum(kernel.duration for kernel in call) for call in cut(kernels, REPEATS, cold=False)
    )


def measure_ceilings(clock: KernelClock) -> Ceilings:
    """Measures copy bandwidth, look-up rate and the cost of a launch."""
    source = jnp.ones(COPY_BYTES // 4, jnp.float32)
    # An addition, since XLA may hand a plain copy to a copy engine.
    copy_us = _kernel_us(clock, lambda x: x + 1, source)
    del source

    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, CENTROIDS, LOOKUP_PROGRAMS * LOOKUP_BLOCK, np.int32))
    rates = dict.fromkeys(TABLE_DTYPES, 0.0)
    for dtype in TABLE_DTYPES:
        for together in (1, 4):
            table = jnp.asarray(rng.standard_normal((SUBSPACES * CENTROIDS, together)), dtype)
            us = _kernel_us(clock, sum_of_lookups, table, codes)
            rate = codes.size * LOOKUPS_PER_CODE * together / us * 1e6
            rates[dtype] = max(rates[dtype], rate)

    one = jnp.zeros(1, jnp.float32)
    return Ceilings(
        copy_bytes_per_second=2 * COPY_BYTES / copy_us * 1e6,
        lookups_per_second=rates,
        kernel_us=_kernel_us(clock, lambda x: x + 1, one),
    )


def scored_tokens(workload: Workload) -> list[int]:
    """How many tokens of each batch row are candidates: none where all are selected anyway."""
    config, counts = workload.config, []
    for visible in workload.lengths:
        candidates = max(visible - config.window_size - config.first_candidate, 0)
        counts.append(0 if visible <= config.short_context(workload.T) else candidates)
    return counts


def step_work(workload: Workload) -> Work:
    """Least work of a decode step: candidates' codes once a kv head, their look-ups a query head.

    Its bytes are codes, codebooks, queries, new keys and codes, lengths, lists and weights. A
    selector that keeps tokens sorted by code needs less.
    """
    w, config = workload, workload.config
    itemsize = jnp.dtype(w.dtype).itemsize
    dimensions = w.H // config.num_subspaces + (config.metric == "ip")
    scored = sum(scored_tokens(w))
    moved = w.K * config.num_subspaces * scored
    moved += w.B * w.K * config.num_subspaces * config.num_centroids * dimensions * itemsize
    moved += w.B * w.T * (w.N + w.K) * w.H * itemsize
    moved += w.B * w.T * w.K * config.num_subspaces
    moved += 2 * w.B * 4
    moved += w.B * w.T * w.N * (config.max_selected(w.T) + 1) * 4
    if w.weights:
        moved += w.B * w.T * w.N * w.capacity * itemsize
    return Work(
        bytes=moved,
        lookups=w.T * w.N * config.num_subspaces * scored,
        table_dtype=np.dtype(config.table_dtype).name,
    )


def top_k_work(w: Workload) -> Work:
    """Least work of a top-k of the candidates' float32 scores: values and int32 positions out."""
    return Work(bytes=w.B * w.T * w.N * (num_candidates(w) + 2 * top_k_size(w)) * 4, lookups=0)


def floor(work: Work, ceilings: Ceilings) -> dict[str, float]:
    """The time that no implementation which does this work can beat, in microseconds.

    Returns:
      `us`, and its parts: bytes and look-ups can overlap, so the larger counts; a launch adds.
    """
    bytes_us = work.bytes / ceilings.copy_bytes_per_second * 1e6
    lookups_us = work.lookups / ceilings.lookups_per_second[work.table_dtype] * 1e6
    us = max(bytes_us, lookups_us) + ceilings.kernel_us
    return {"us": us, "bytes_us": bytes_us, "lookups_us": lookups_us}
