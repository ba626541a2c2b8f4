"""One clock for every implementation: kernel times by CUPTI, wall-clock times, their statistics."""

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

# Written before a call to empty the L2 cache: larger than that of any GPU so far.
FLUSH_BYTES = 256 * 2**20

# Calls at the head of a stream that are not counted: the first ones start on an idle GPU, where
# every kernel takes about a microsecond more.
LEAD = 3


class ClockError(RuntimeError):
    """The profiler did not record what was run."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One activity of the GPU: a kernel, a copy or a fill.

    Attributes:
      name: as the profiler gives it.
      start: in microseconds; only differences mean something.
      duration: in microseconds.
    """

    name: str
    start: float
    duration: float


class Timeable(Protocol):
    """What the clock times."""

    def call(self) -> None:
        """Launches the work."""

    def wait(self) -> None:
        """Blocks until the device has done it."""


# A recorder runs a function and returns what the GPU did meanwhile.
Recorder = Callable[[Callable[[], None]], list[Kernel]]


def record_with_torch(run: Callable[[], None]) -> list[Kernel]:
    """Records by torch.profiler: CUPTI sees all of a process, JAX's kernels too."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

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


def record_with_jax(run: Callable[[], None]) -> list[Kernel]:
    """Records by jax.profiler, for a process without PyTorch.

    XLA launches kernels one by one instead of as command buffers while this profiler is on.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    if line.name and line.name.startswith("Stream"):
                        kernels += [
                            Kernel(event.name, event.start_ns / 1e3, event.duration_ns / 1e3)
                            for event in line.events
                        ]
    return kernels


RECORDERS: dict[str, Recorder] = {
    "torch.profiler": record_with_torch,
    "jax.profiler": record_with_jax,
}


@dataclasses.dataclass(frozen=True)
class Stream:
    """Calls of one implementation in a row.

    Attributes:
      launch: launches one call and does not wait for it.
      wait: blocks until the device has done what was launched.
      framework: "jax" or "torch": the cache is flushed in the order of its own launches.
      calls: how many to record.
    """

    launch: Callable[[], None]
    wait: Callable[[], None]
    framework: str
    calls: int


class KernelClock:
    """Records the kernels of streams of calls, each stream between two marks on the device.

    A mark is a kernel that nothing else launches. The device is idle before and after each, so
    that order in time is enough to tell which stream a kernel belongs to. Within a stream nothing
    waits: its calls all launch the same kernels, so their number cuts it.

    Attributes:
      name: of the recorder.
    """

    def __init__(self, name: str, record: Recorder):
        self.name = name
        self._record = record
        self._one = jnp.ones(1, jnp.float32)
        self._cube_root = jax.jit(jnp.cbrt)
        self._flushes: dict[str, Callable[[], None]] = {}
        self._mark()
        record(self._mark)  # The first recording loads CUPTI and may miss kernels.
        names = {kernel.name for kernel in record(self._mark)}
        if len(names) != 1:
            raise ClockError(f"{name} recorded {sorted(names)} where JAX ran one kernel")
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


def open_kernel_clock(choice: str = "auto") -> KernelClock:
    """Finds a profiler that records the kernels of this process.

    Args:
      choice: a name of RECORDERS, or "auto": PyTorch's if it sees the GPU, which records both
        frameworks, then JAX's.

    Returns:
      The clock.

    Raises:
      ClockError: if there is none, with what each one lacked.
    """
    names = list(RECORDERS) if choice == "auto" else [choice]
    if choice == "auto" and not _torch_sees_gpu():
        names.remove("torch.profiler")
    problems = []
    for name in names:
        try:
            return KernelClock(name, RECORDERS[name])
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    raise ClockError("; ".join(problems))


def _torch_sees_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keeps Python's collector, which takes a fifth of a second here, out of what is timed."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def synchronised(step: Timeable, calls: int) -> list[float]:
    """Wall-clock microseconds of each call, launch to result."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        step.call()
        step.wait()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def amortised(step: Timeable, calls: int) -> float:
    """Wall-clock microseconds a call when the host waits after the last one only."""
    start = time.perf_counter()
    for _ in range(calls):
        step.call()
    step.wait()
    return (time.perf_counter() - start) / calls * 1e6


def between_events(step: Timeable, calls: int) -> list[float]:
    """Microseconds between two CUDA events around each call of a torch implementation."""
    import torch

    times = []
    for _ in range(calls):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        step.call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Statistics of samples: quantiles interpolate linearly, std is that of the samples."""
    x = np.asarray(samples, np.float64)
    return {
        "count": int(x.size),
        "min": float(x.min()),
        "p20": float(np.quantile(x, 0.2)),
        "median": float(np.median(x)),
        "p80": float(np.quantile(x, 0.8)),
        "p99": float(np.quantile(x, 0.99)),
        "max": float(x.max()),
        "mean": float(x.mean()),
        "std": float(x.std()),
    }
