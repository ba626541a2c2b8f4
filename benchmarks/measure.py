"""One workload: outputs checked, then all implementations timed in turns."""

import contextlib
import dataclasses
import functools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import clock as clocks
from benchmarks import implementations as steps
from benchmarks import machine
from benchmarks.agreement import Reference
from benchmarks.ceilings import Ceilings, floor
from benchmarks.clock import KernelClock, summary
from benchmarks.implementations import Implementation, Step
from benchmarks.stages import breakdown
from benchmarks.workloads import Workload, make_inputs

WARM_UPS = 3  # XLA records command buffers in the first calls.
SECONDS_A_MEASUREMENT = 0.3  # for each implementation; fewer repetitions of what is slow
FEWEST = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repetitions:
    """How often things are timed; all of it in turns between the implementations.

    Attributes:
      kernels: calls whose kernels are recorded, with cold and again with warm cache.
      calls: synchronised calls.
      amortised: calls in all, for the amortised time.
      rounds: turns that `calls` and `amortised` are divided into.
      all_kernels: record as many calls as wanted, however long that takes.
    """

    kernels: int = 30
    calls: int = 50
    amortised: int = 200
    rounds: int = 5
    all_kernels: bool = False


class WrongOutput(Exception):
    """An implementation did not select what it should."""


QUICK = Repetitions(kernels=5, calls=8, amortised=20, rounds=2)


@dataclasses.dataclass
class Row:
    """One implementation on one workload: what comes out of it.

    Attributes:
      workload: what is run.
      implementation: what runs it.
      step: while it is ready to be timed.
      status: "ok", "skipped" or "failed".
      reason: of the latter two, or what is missing from the first.
      seconds: one synchronised call, about.
      numbers: what was measured.
    """

    workload: Workload
    implementation: Implementation
    step: Step | None = None
    status: str = "ok"
    reason: str | None = None
    seconds: float = 0.0
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def command(self) -> str:
        """What repeats this row."""
        return (
            f"python -m benchmarks run --workload {self.workload.name} "
            f"--implementation {self.implementation.name}"
        )

    def give_up(self, status: str, reason: str) -> None:
        """Takes the row out of what follows."""
        self.status, self.reason, self.step = status, reason, None
        say(f"{status}: {self.workload.name}, {self.implementation.name}: {reason}")
        if status == "failed":
            say(f"  repeat it: {self.command}")

    @contextlib.contextmanager
    def attempt(self, doing: str, *, needed: bool = True) -> Iterator[None]:
        """Keeps what goes wrong inside to this row; a lack of memory ends it only if needed."""
        try:
            yield
        except NotImplementedError as error:
            self.give_up("skipped", str(error))
        except WrongOutput as error:
            self.give_up("failed", f"wrong output: {error}")
        except Exception as error:
            if is_out_of_memory(error):
                reason = f"out of memory while {doing}: {_first_line(error)}"
                if needed:
                    self.give_up("skipped", reason)
                else:
                    self.reason = reason
                return
            traceback.print_exc()
            self.give_up("failed", f"{doing}: {type(error).__name__}: {_first_line(error)}")

    def repetitions(self, wanted: int) -> int:
        """As many as wanted, or as time allows."""
        affordable = int(SECONDS_A_MEASUREMENT / max(self.seconds, 1e-9))
        return min(wanted, max(affordable, FEWEST))


def say(message: str) -> None:
    """Prints a line that stays, above a progress bar too."""
    print(message, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:500]


def check(step: Step, reference: Reference) -> None:
    """Raises WrongOutput, naming the first row of it, unless the step's output is right."""
    try:
        step.check(reference)
    except AssertionError as error:
        raise WrongOutput(str(error)) from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether a framework ran out of device memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "RESOURCE_EXHAUSTED" in str(error)
        or "out of memory" in str(error).lower()
    )


def why_not(workload: Workload, implementation: Implementation, gpu: bool) -> str | None:
    """Why a row is not worth trying, or None."""
    if implementation.needs_gpu and not gpu:
        return "needs an NVIDIA GPU"
    if implementation.framework == "torch" and machine.version("torch") is None:
        return "PyTorch is not installed"
    if min(workload.lengths) < workload.T:
        return f"a row of L={min(workload.lengths)} has no room for the step's {workload.T} tokens"
    if max(workload.lengths) > workload.capacity:
        return f"L={max(workload.lengths)} exceeds the capacity S={workload.capacity}"
    config = workload.config
    codes = workload.B * workload.K * config.num_subspaces * workload.capacity
    # The codes twice, and float64 scores of one head at least.
    on_host = 2 * codes + 8 * workload.capacity
    for place, needed, there in (
        ("this machine", on_host, machine.host_bytes()),
        ("the device", implementation.bytes_needed(workload), machine.device_bytes()),
    ):
        if needed > there:
            return f"needs {needed / 2**30:.1f} GiB or more, {place} has {there / 2**30:.1f} GiB"
    return None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all workloads of a run share.

    Attributes:
      gpu: whether there is one.
      clock: of kernels; None without a GPU.
      ceilings: of the GPU; None without a kernel clock.
      repetitions: how often to time.
      chains: whether to time steps inside one larger jit.
      advance: tells the user what is being done.
      seconds: what each phase of each workload took, filled by `measure`.
    """

    gpu: bool
    clock: KernelClock | None
    ceilings: Ceilings | None
    repetitions: Repetitions
    chains: bool
    advance: Callable[[str], None]
    seconds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, workload: Workload, name: str) -> Iterator[None]:
        """Notes how long the inside takes."""
        start = time.perf_counter()
        yield
        took = round(time.perf_counter() - start, 2)
        self.seconds.setdefault(workload.name, {})[name] = took


def measure(
    workload: Workload, implementations: Sequence[Implementation], settings: Settings
) -> list[Row]:
    """Checks and times implementations on one workload; what fails is in its row."""
    rows = [Row(workload, implementation) for implementation in implementations]
    for row in rows:
        with row.attempt("looking at sizes"):
            if reason := why_not(workload, row.implementation, settings.gpu):
                row.give_up("skipped", reason)
    if not any(row.status == "ok" for row in rows):
        return rows
    try:
        with settings.phase(workload, "inputs"):
            reference = Reference(workload, make_inputs(workload))
    except Exception as error:
        traceback.print_exc()
        for row in rows:
            if row.status == "ok":
                row.give_up("failed", f"making inputs: {type(error).__name__}: {error}")
        return rows
    with settings.phase(workload, "building and checking"):
        for row in rows:
            settings.advance(f"{workload.name}: {row.implementation.name}")
            if row.status == "ok":
                with row.attempt("building"):
                    prepare(row, reference, settings)
    settings.advance(f"{workload.name}: timing")
    ready = [row for row in rows if row.step is not None]
    if settings.clock is not None:
        with settings.phase(workload, "kernels"):
            time_kernels(ready, settings)
    with settings.phase(workload, "calls"):
        time_calls(ready, settings)
    if settings.chains:
        with settings.phase(workload, "chains"):
            time_chains(ready, reference, settings)
    for row in rows:
        row.step = None
    steps.release()
    return rows


def prepare(row: Row, reference: Reference, settings: Settings) -> None:
    """Builds a step, warms it up and checks its output."""
    step = row.implementation.build(reference)
    row.seconds = min(clocks.synchronised(step, WARM_UPS)) / 1e6
    check(step, reference)
    row.step = step
    row.numbers["compile_seconds"] = step.compile_seconds
    row.numbers["memory_bytes"] = step.memory_bytes
    if settings.ceilings is not None:
        row.numbers["floor"] = floor(row.implementation.work(row.workload), settings.ceilings)


def in_turns(rows: Sequence[Row], repetitions: Repetitions) -> list[Row]:
    """The rows round-robin, each as often as it can afford."""
    wanted = repetitions.kernels
    counts = {
        id(row): wanted if repetitions.all_kernels else row.repetitions(wanted) for row in rows
    }
    return [row for turn in range(wanted) for row in rows if turn < counts[id(row)]]


def time_kernels(rows: Sequence[Row], settings: Settings) -> None:
    """Kernel times of all rows, with cold and with warm L2 cache."""

    def call(row: Row) -> None:
        with row.attempt("recording kernels"):
            if row.step is not None:
                row.step.call()
                row.step.wait()

    for cache in ("cold", "warm"):
        order = in_turns(rows, settings.repetitions)
        calls = [functools.partial(call, row) for row in order]
        try:
            recorded = settings.clock.measure(calls, cold=cache == "cold")
        except Exception as error:
            traceback.print_exc()
            for row in rows:
                if row.step is not None:  # It can still be timed by the wall clock.
                    row.status, row.reason = "failed", f"kernel times: {_first_line(error)}"
            return
        for row in rows:
            of_row = [kernels for r, kernels in zip(order, recorded, strict=True) if r is row]
            if row.step is None:
                continue
            if not all(of_row):
                row.give_up("failed", f"{settings.clock.name} recorded a call without kernels")
                continue
            totals = [sum(kernel.duration for kernel in kernels) for kernels in of_row]
            row.numbers[cache] = summary(totals)
            if cache == "warm":
                row.numbers["launches"] = int(np.median([len(kernels) for kernels in of_row]))
                row.numbers["breakdown"] = breakdown(of_row, row.implementation.framework)


def time_calls(rows: Sequence[Row], settings: Settings) -> None:
    """Wall-clock times: synchronised, between CUDA events, and amortised."""
    kinds: dict[str, tuple[int, Callable[[Step, int], list[float]]]] = {
        "call": (settings.repetitions.calls, clocks.synchronised),
        "amortised": (settings.repetitions.amortised, lambda step, n: [clocks.amortised(step, n)]),
    }
    if settings.gpu:
        kinds["event"] = (settings.repetitions.calls, clocks.between_events)
    for kind, (wanted, timing) in kinds.items():
        samples: dict[int, list[float]] = {id(row): [] for row in rows}
        for _ in range(settings.repetitions.rounds):
            for row in rows:
                if kind == "event" and row.implementation.framework != "torch":
                    continue
                count = -(-row.repetitions(wanted) // settings.repetitions.rounds)
                with row.attempt(f"timing ({kind})"):
                    if row.step is not None:
                        samples[id(row)] += timing(row.step, count)
                        if kind == "amortised":
                            calls = row.numbers.get("amortised_calls", 0)
                            row.numbers["amortised_calls"] = calls + count
        for row in rows:
            if row.step is not None and samples[id(row)]:
                row.numbers[kind] = summary(samples[id(row)])


def time_chains(rows: Sequence[Row], reference: Reference, settings: Settings) -> None:
    """Wall-clock time a step inside one larger jit."""
    chains = []
    for row in rows:
        with row.attempt("compiling a chain of steps", needed=False):
            # Where launches take no part of the time, a chain shows nothing new.
            slow = row.seconds * steps.CHAIN_STEPS > SECONDS_A_MEASUREMENT
            if row.step is None or slow:
                continue
            if (chain := row.step.chain()) is not None:
                for _ in range(WARM_UPS):
                    chain.call()
                    chain.wait()
                check(chain, reference)
                row.numbers["chain_compile_seconds"] = chain.compile_seconds
                chains.append((row, chain, []))
    for _ in range(settings.repetitions.rounds):
        for row, chain, samples in chains:
            with row.attempt("timing a chain of steps"):
                if row.step is not None:
                    count = -(-row.repetitions(settings.repetitions.calls) // chain.steps)
                    samples.append(clocks.amortised(chain, count) / chain.steps)
    for row, chain, samples in chains:
        if row.step is not None:
            row.numbers["in_jit"] = summary(samples) | {"steps": chain.steps}
