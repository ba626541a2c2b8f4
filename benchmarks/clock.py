"""One clock for every implementation: kernel times by CUPTI, wall-clock times, their statistics."""

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

# Written between calls to empty the L2 cache: larger than that of any GPU so far.
FLUSH_BYTES = 256 * 2**20

CALLS_A_RECORDING = 200  # A record of thousands of kernels takes long to write and to read.


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
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            # Activities outside of the recording are dropped, and the clocks of GPU and host are
            # matched to some microseconds only: keep away from its edges.
            time.sleep(0.01)
            run()
            time.sleep(0.01)
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(errors="replace"))["traceEvents"]
    return [
        Kernel(event["name"], float(event["ts"]), float(event["dur"]))
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
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


class KernelClock:
    """Times calls by the kernels that run between two marks on the device.

    A mark is a kernel that nothing else launches. The device is idle before and after each, so
    that order in time is enough to tell which call a kernel belongs to, on whatever stream it ran.

    Attributes:
      name: of the recorder.
    """

    def __init__(self, name: str, record: Recorder):
        self.name = name
        self._record = record
        self._one = jnp.ones(1, jnp.float32)
        self._cube_root = jax.jit(jnp.cbrt)
        self._increment = jax.jit(lambda x: x + 1, donate_argnums=0)
        self._flushed = None
        self._mark()
        record(self._mark)  # The first recording loads CUPTI and may miss kernels.
        names = {kernel.name for kernel in record(self._mark)}
        if len(names) != 1:
            raise ClockError(f"{name} recorded {sorted(names)} where JAX ran one kernel")
        (self._mark_name,) = names

    def _mark(self) -> None:
        self._cube_root(self._one).block_until_ready()

    def flush(self) -> None:
        """Leaves nothing of earlier calls in the L2 cache."""
        if self._flushed is None:
            self._flushed = jnp.zeros(FLUSH_BYTES // 4, jnp.float32)
        self._flushed = self._increment(self._flushed).block_until_ready()

    def measure(self, calls: Sequence[Callable[[], None]], *, cold: bool) -> list[list[Kernel]]:
        """Runs calls in order and returns the kernels of each, ordered by time.

        Args:
          calls: each launches work and waits until it is done.
          cold: empty the L2 cache before each call.

        Returns:
          For each call its kernels.

        Raises:
          ClockError: if marks were lost.
        """

        recorded = []
        for first in range(0, len(calls), CALLS_A_RECORDING):
            some = calls[first : first + CALLS_A_RECORDING]
            kernels = self._record(functools.partial(self._run, some, cold))
            recorded += between_marks(kernels, self._mark_name, len(some))
        return recorded

    def _run(self, calls: Sequence[Callable[[], None]], cold: bool) -> None:
        for call in calls:
            if cold:
                self.flush()
            self._mark()
            call()
            self._mark()


def between_marks(kernels: Sequence[Kernel], mark: str, calls: int) -> list[list[Kernel]]:
    """Cuts a record into calls: the kernels between marks 2 i and 2 i + 1 are those of call i."""
    segments: list[list[Kernel]] = [[]]
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if kernel.name == mark:
            segments.append([])
        else:
            segments[-1].append(kernel)
    if len(segments) != 2 * calls + 1:
        raise ClockError(
            f"expected {2 * calls} marks ({mark}) around {calls} calls, got {len(segments) - 1}: "
            "the profiler lost records, or something else launches this kernel"
        )
    return segments[1::2]


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
    """Keeps Python's collector out of wall-clock times."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def synchronised(step: Timeable, calls: int) -> list[float]:
    """Wall-clock microseconds of each call, launch to result."""
    times = []
    with no_garbage_collection():
        for _ in range(calls):
            start = time.perf_counter()
            step.call()
            step.wait()
            times.append((time.perf_counter() - start) * 1e6)
    return times


def amortised(step: Timeable, calls: int) -> float:
    """Wall-clock microseconds a call when the host waits after the last one only."""
    with no_garbage_collection():
        start = time.perf_counter()
        for _ in range(calls):
            step.call()
        step.wait()
        return (time.perf_counter() - start) / calls * 1e6


def between_events(step: Timeable, calls: int) -> list[float]:
    """Microseconds between two CUDA events around each call of a torch implementation."""
    import torch

    times = []
    with no_garbage_collection():
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
