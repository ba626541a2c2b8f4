"""One clock for every implementation: kernel times by CUPTI, wall-clock times, statistics."""

import contextlib
import functools
import gc
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Written before a call to empty the L2 cache, which is far smaller: it also takes longer than the
# host to launch the call, so that no kernel of the call starts on an idle GPU.
FLUSH_BYTES = 2**30

# Calls at the head of a stream that are not counted: the first ones start on an idle GPU, where
# every kernel takes about a microsecond more.
LEAD = 3


class ClockError(RuntimeError):
    """The profiler did not record what was run."""


class Kernel(NamedTuple):
    """One activity of the GPU: a kernel, a copy or a fill."""

    name: str  # as the profiler gives it
    start: float  # microseconds, of which only differences mean something
    duration: float  # microseconds


class Step:
    """One implementation on one workload, ready to be called again and again: what is timed.

    Attributes:
      numbers: what its row says of it beside times.
    """

    numbers: dict[str, Any]

    def call(self) -> None:
        """Launches one call, as a user does."""
        raise NotImplementedError

    def call_recorded(self) -> None:
        """Launches the same kernels in a way that a profiler names right."""
        self.call()

    def wait(self) -> None:
        """Blocks until the device has done what was launched."""
        raise NotImplementedError

    def check(self, reference: Any) -> None:
        """Raises AssertionError unless the latest call's outputs are right."""
        raise NotImplementedError

    def chain(self) -> "Step | None":
        """A step that is this one many times (`numbers["steps"]`) inside one jit, or None."""
        return None


def record_with_torch(run: Callable[[], None]) -> list[Kernel]:
    """Records by torch.profiler: CUPTI sees all of a process, JAX's kernels too."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another recording drops what this one has
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            # Activities outside of the recording are dropped, and the clocks of GPU and host are
            # matched to some microseconds only: keep away from its edges.
            time.sleep(0.01)
            run()
            time.sleep(0.01)
    # The profiler's own records: its trace file says the same in a hundred times the time.
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.device_type() == DeviceType.CUDA]
    first = min((event.start_ns() for event in events), default=0)
    return [
        Kernel(event.name(), (event.start_ns() - first) / 1e3, event.duration_ns() / 1e3)
        for event in events
    ]


class Stream(NamedTuple):
    """Calls of one implementation in a row."""

    launch: Callable[[], None]  # one call, and does not wait for it
    wait: Callable[[], None]  # until the device has done what was launched
    framework: str  # "jax" or "torch": the cache is flushed in the order of its own launches
    calls: int  # how many to record


class KernelClock:
    """Records the kernels of streams of calls, each stream between two marks on the device.

    A mark is a kernel that nothing else launches. The device is idle before and after each, so
    that order in time is enough to tell which stream a kernel belongs to. Within a stream nothing
    waits: its calls all launch the same kernels, so their number cuts it.
    """

    def __init__(self, record: Callable[[Callable[[], None]], list[Kernel]] = record_with_torch):
        """Takes what runs a function and returns what the GPU did meanwhile.

        Raises:
          ClockError: if it does not see what JAX runs.
        """
        self._record = record
        self._one = jnp.ones(1, jnp.float32)
        self._cube_root = jax.jit(jnp.cbrt)
        self._flushes: dict[str, Callable[[], None]] = {}
        self._mark()
        record(self._mark)  # The first recording loads CUPTI and may miss kernels.
        names = {kernel.name for kernel in record(self._mark)}
        if len(names) != 1:
            raise ClockError(f"the profiler recorded {sorted(names)} where JAX ran one kernel")
        (self._mark_name,) = names

    def _mark(self) -> None:
        self._cube_root(self._one).block_until_ready()

    def record(self, streams: Sequence[Stream], *, cold: bool) -> list[list[Kernel]]:
        """Runs streams in order and returns the kernels of each, ordered by time, for `cut`.

        Args:
          streams: what to run; each runs LEAD calls more than it has.
          cold: empty the L2 cache before each call.

        Returns:
          For each stream its kernels.

        Raises:
          ClockError: if marks were lost.
        """
        if cold:  # Their first launches compile and allocate.
            for framework in {stream.framework for stream in streams}:
                self._flush(framework)()
            self._mark()
        kernels = self._record(functools.partial(self._run, streams, cold))
        return between_marks(kernels, self._mark_name, len(streams))

    def _run(self, streams: Sequence[Stream], cold: bool) -> None:
        for stream in streams:
            flush = self._flush(stream.framework) if cold else None
            self._mark()
            for _ in range(LEAD + stream.calls):
                if flush is not None:
                    flush()
                stream.launch()
            stream.wait()
            self._mark()

    def _flush(self, framework: str) -> Callable[[], None]:
        if framework not in self._flushes:
            self._flushes[framework] = {"jax": jax_flush, "torch": torch_flush}[framework]()
        return self._flushes[framework]


def jax_flush() -> Callable[[], None]:
    """A function that launches one kernel, after which L2 holds nothing of earlier ones."""
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    buffer = jnp.zeros(FLUSH_BYTES // 4, jnp.float32)

    def flush():
        nonlocal buffer
        buffer = increment(buffer)

    return flush


def torch_flush() -> Callable[[], None]:
    """The same for what PyTorch launches, which runs on another stream than JAX's."""
    import torch

    buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
    return lambda: buffer.add_(1)


def between_marks(kernels: Sequence[Kernel], mark: str, streams: int) -> list[list[Kernel]]:
    """Cuts a record into streams: those between marks 2 i and 2 i + 1 are stream i's."""
    segments: list[list[Kernel]] = [[]]
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if kernel.name == mark:
            segments.append([])
        else:
            segments[-1].append(kernel)
    if len(segments) != 2 * streams + 1:
        raise ClockError(
            f"expected {2 * streams} marks ({mark}) around {streams} streams, "
            f"got {len(segments) - 1}: "
            "the profiler lost records, or something else launches this kernel"
        )
    return segments[1::2]


def cut(kernels: Sequence[Kernel], calls: int, *, cold: bool) -> list[list[Kernel]]:
    """Cuts a stream into its calls, all of the same number of kernels, and drops the lead.

    Args:
      kernels: of LEAD + calls calls, ordered by time.
      calls: how many calls are wanted.
      cold: each call's first kernel is the flush, and is dropped too.

    Returns:
      For each call its kernels.

    Raises:
      ClockError: if calls did not have the same number of kernels, or none.
    """
    each, rest = divmod(len(kernels), LEAD + calls)
    if rest or each <= cold:
        raise ClockError(
            f"recorded {len(kernels)} kernels of {LEAD + calls} calls{' and flushes' * cold}: "
            "expected the same number for each, and at least one"
        )
    found = [list(kernels[i * each : (i + 1) * each]) for i in range(LEAD, LEAD + calls)]
    if not cold:
        return found
    if len({call[0].name for call in found}) != 1:
        raise ClockError("calls do not all begin with the kernel that flushes the cache")
    return [call[1:] for call in found]


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps Python's collector, which takes a fifth of a second here, out of what is timed."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def synchronised(step: Step, calls: int) -> list[float]:
    """Wall-clock microseconds of each call, launch to result."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        step.call()
        step.wait()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def amortised(step: Step, calls: int) -> float:
    """Wall-clock microseconds a call when the host waits after the last one only."""
    start = time.perf_counter()
    for _ in range(calls):
        step.call()
    step.wait()
    return (time.perf_counter() - start) / calls * 1e6


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Statistics of samples: quantiles interpolate linearly, std is that of the samples."""
    x = np.asarray(samples, np.float64)
    quantiles = {"min": 0, "p20": 0.2, "median": 0.5, "p80": 0.8, "p99": 0.99, "max": 1}
    found = {name: float(np.quantile(x, share)) for name, share in quantiles.items()}
    return {"count": x.size, **found, "mean": float(x.mean()), "std": float(x.std())}


# The kernels of a call, by what they are for.

# The first pattern that is found in a kernel's name counts. PyTorch's gather and scatter share a
# kernel, and differ in what it is instantiated with.
STAGES = {
    "torch": (
        ("full attention", r"flash|fmha|sdpa"),
        ("top-k", r"top_?k|radixfind|devicescan|blockwise"),
        ("index generation", r"sparse_ind|scatter_fill|scatter_gather_internal_kernel<true"),
        ("score", r"score_kernel|gemm|gemv|cutlass|gather"),
        ("sort", r"sort"),
    ),
    "jax": (
        ("full attention", r"flash|fmha|sdpa"),
        ("append, look-up table", r"append_kernel|lookup_table_kernel|write_kernel|sum_values"),
        ("cells", r"always_attended_kernel|seal_kernel"),
        ("cells select", r"cells_select_kernel|search_pool_kernel|count_candidates_kernel"),
        ("group maxima", r"group_maxima_kernel"),
        ("threshold select", r"threshold_select_kernel"),
        ("scores", r"score_kernel"),
        ("cells select, attention", r"cells_attend_kernel"),
        ("cells select, rest", r"cells_pool_kernel|cells_rest_kernel"),
        ("rerank, rest", r"attend_pool|rank_keys|weigh_(tokens|codes)|listed_rest_kernel"),
        ("host memory", r"keep_kernel|put_kernel|take_kernel"),
        ("attention", r"listed_kernel|merge_kernel|always_kernel|shared_kernel"),
        ("exchange", r"listed_ranks_kernel|keep_best_kernel|nccl"),
        ("sparse index", r"count_kernel|verify_cut_kernel|sparse_index_kernel"),
        ("k-means", r"centroid_sums_kernel|add_parts_kernel"),
        ("top-k", r"sort|top_?k|radix|raft|select_k"),
    ),
}


def stages_of(kernels: Sequence[Kernel], framework: str) -> list[str]:
    """What each kernel of a call is for: the stages of the original, or of our pipelines.

    A sort right after a top-k is part of it: torch.topk sorts what it found.
    """
    stages: list[str] = []
    for kernel in kernels:
        found = (
            stage
            for stage, pattern in STAGES[framework]
            if re.search(pattern, kernel.name, re.IGNORECASE)
        )
        stage = next(found, "other")
        if stage == "sort" and stages and stages[-1] == "top-k":
            stage = "top-k"
        stages.append(stage)
    return stages


def time_by_stage(calls: Sequence[Sequence[Kernel]], framework: str) -> dict[str, float]:
    """Median microseconds a call of each stage, the longest first."""
    times: dict[str, list[float]] = {}
    for number, kernels in enumerate(calls):
        for kernel, stage in zip(kernels, stages_of(kernels, framework), strict=True):
            times.setdefault(stage, [0.0] * len(calls))[number] += kernel.duration
    medians = {stage: float(np.median(samples)) for stage, samples in times.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))
