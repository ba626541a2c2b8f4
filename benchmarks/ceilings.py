"""What the GPU can do at best, measured in the same run, and the floor of a workload from it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.clock import KernelClock, Stream, amortised, cut, no_garbage_collection
from benchmarks.programs import NO_COMMAND_BUFFERS
from jax_indexer.kernels import backend
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Best rates of one GPU.

    Attributes:
      copy_bytes_per_second: of a large copy, bytes read and bytes written together.
      lookups_per_second: entries of a table in L1 read by random codes and summed, for each dtype
        of the table.
      kernel_us: kernel time of the smallest kernel.
      dispatch_us: wall-clock time of a jitted call of it, amortised.
      dispatch_profiled_us: the same after the profiler was loaded: what it adds to wall times.
    """

    copy_bytes_per_second: float
    lookups_per_second: dict[str, float]
    kernel_us: float
    dispatch_us: float
    dispatch_profiled_us: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The least that one call must do, if it looks at every candidate's codes once.

    Attributes:
      bytes: that must move between device memory and the chip.
      lookups: of table entries.
      table_dtype: of the table.
      launches: of kernels.
    """

    bytes: int
    lookups: int
    table_dtype: str = "float32"
    launches: int = 1


class SmallestCall:
    """A jitted call with next to nothing in it."""

    def __init__(self):
        self._add = jax.jit(lambda x: x + 1)
        self._x = self._add(jnp.zeros(1, jnp.float32))

    def call(self):
        self._x = self._add(self._x)

    def wait(self):
        self._x.block_until_ready()


def dispatch_us() -> float:
    """Wall-clock microseconds of the smallest jitted call, amortised."""
    call = SmallestCall()
    with no_garbage_collection():
        amortised(call, 200)
        return min(amortised(call, 1000) for _ in range(5))


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
    table: jax.Array,
    codes: jax.Array,
    *,
    lookups: int = LOOKUPS_PER_CODE,
) -> jax.Array:
    """Sums table rows for every code, and each sum over its columns.

    Args:
      table: [SUBSPACES * CENTROIDS, G]; the G entries of a row are read by one load.
      codes: int32[programs * LOOKUP_BLOCK].
      lookups: rows a code.

    Returns:
      float32[programs * LOOKUP_BLOCK].
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


def measure_ceilings(clock: KernelClock, dispatch_before: float) -> Ceilings:
    """Measures copy bandwidth, look-up rate and the cost of a launch.

    Args:
      clock: kernel clock of this process.
      dispatch_before: `dispatch_us()` as it was before the clock was opened.

    Returns:
      The ceilings.
    """
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
        dispatch_us=dispatch_before,
        dispatch_profiled_us=dispatch_us(),
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

    Args:
      workload: the step.

    Returns:
      Its bytes (codes, codebooks, queries, new keys and codes, lengths, lists, weights) and
      look-ups. A selector that keeps tokens sorted by code needs less.
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


def top_k_work(rows: int, length: int, k: int) -> Work:
    """Least work of a top-k of float32 rows: scores in, values and int32 positions out."""
    return Work(bytes=rows * (length + 2 * k) * 4, lookups=0)


def floor(work: Work, ceilings: Ceilings) -> dict[str, float]:
    """The time that no implementation which does this work can beat, in microseconds.

    Args:
      work: what must be done.
      ceilings: of the GPU.

    Returns:
      `us`, and its parts: bytes and look-ups can overlap, so the larger counts; launches add.
    """
    bytes_us = work.bytes / ceilings.copy_bytes_per_second * 1e6
    lookups_us = work.lookups / ceilings.lookups_per_second[work.table_dtype] * 1e6
    launches_us = work.launches * ceilings.kernel_us
    us = max(bytes_us, lookups_us) + launches_us
    return {
        "us": us,
        "bytes": work.bytes,
        "bytes_us": bytes_us,
        "lookups": work.lookups,
        "lookups_us": lookups_us,
        "launches_us": launches_us,
    }
