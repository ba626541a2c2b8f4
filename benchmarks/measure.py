"""Rows of results: implementations of a workload, checked, then timed in turns."""

import contextlib
import dataclasses
import functools
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import clock as clocks
from benchmarks import jax_steps, results, torch_steps
from benchmarks.ceilings import Ceilings, Work, floor, step_work
from benchmarks.clock import ClockError, Kernel, KernelClock, Step, Stream, summary, time_by_stage
from benchmarks.jax_steps import Forms, Programs
from benchmarks.results import Plan
from parity.inputs import Workload
from parity.progress import progress

WARM_UPS = 3  # XLA records command buffers in the first calls.

# Repetitions end where a measurement of one implementation would take longer than this; what is
# so slow that FEWEST take longer has those.
SECONDS_A_MEASUREMENT = 0.2
FEWEST = 5
SHORTEST_STREAM = 10  # calls: with fewer in a row the lead takes too large a part


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A name of the command line.

    Attributes:
      name: "framework:form", or a library function's own name.
      build: makes the step from its inputs and from what `programs` gave.
      programs: starts to compile what the step needs; None where nothing can be compiled before.
      work: least work of a call.
      needs_gpu: whether there is nothing to run without one.
      pipeline: whether it is one of our own pipelines, which are measured most often.
      refuses: says why it cannot do a workload, or None.
    """

    name: str
    build: Callable[[Any, Programs], Step]
    programs: Callable[[Workload, Forms], Programs] | None = None
    work: Callable[[Workload], Work] = step_work
    needs_gpu: bool = True
    pipeline: bool = False
    refuses: Callable[[Workload], str | None] = lambda w: None

    @property
    def framework(self) -> str:
        """ "jax" or "torch"."""
        return results.framework_of(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repetitions:
    """How many calls of each implementation are timed."""

    pipeline: int = 1000  # kernels with a warm cache: of our pipelines, however long they take,
    warm: int = 50  # and of the others
    cold: int = 30  # kernels with a flushed cache
    calls: int = 50  # synchronised
    amortised: int = 200  # with one wait for all of a turn
    rounds: int = 10  # turns, between the implementations, that all of these are divided into


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all workloads of a run share."""

    reference: Callable[[Workload], Any]  # what steps are built from, and checked by
    repetitions: Repetitions
    clock: KernelClock | None = None  # None without a GPU
    ceilings: Ceilings | None = None  # None where no floor is wanted
    chains: bool = False  # steps inside one larger jit are timed
    calls: bool = True  # calls are timed by the wall clock


class WrongOutput(Exception):
    """An implementation did not select what it should."""


@dataclasses.dataclass(eq=False)  # a key of what is measured
class Row:
    """One implementation on one workload: what comes out of it.

    Attributes:
      workload: what is run.
      implementation: what runs it.
      kind: of the results it is part of.
      sweep: that it is a point of, if any.
      programs: what is compiled for it.
      step: while it is ready to be timed.
      status: "ok", "skipped" or "failed".
      reason: of the latter two, or what is missing from the first.
      done: whether all of it was measured.
      seconds: one synchronised call, about.
      numbers: what was measured.
    """

    workload: Workload
    implementation: Implementation
    kind: str
    sweep: str | None = None
    programs: Programs = dataclasses.field(default_factory=dict)
    step: Step | None = None
    done: bool = False
    status: str = "ok"
    reason: str | None = None
    seconds: float = 0.0
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def json(self) -> results.Row:
        """The row as a results file has it."""
        row = {"workload": self.workload.name, "implementation": self.implementation.name}
        if self.sweep:
            row["sweep"] = self.sweep
        ended = self.done or self.status != "ok"
        row["status"] = self.status if ended else "skipped"
        if reason := self.reason if ended else "interrupted":
            row["reason"] = reason
        return row | self.numbers

    def give_up(self, status: str, reason: str) -> None:
        """Takes the row out of what follows."""
        self.status, self.reason, self.step, self.programs = status, reason, None, {}
        say(f"{status}: {self.workload.name}, {self.implementation.name}: {reason}")
        if status == "failed":
            name = self.implementation.name
            say(f"  repeat it: {results.command_of(self.kind, self.workload.name, name)}")

    @contextlib.contextmanager
    def attempt(self, doing: str, *, needed: bool = True) -> Iterator[None]:
        """Keeps what goes wrong inside to this row; a lack of memory ends it only if needed."""
        try:
            yield
        except NotImplementedError as error:
            self.give_up("skipped", str(error))
        except WrongOutput as error:
            self.give_up("failed", f"wrong output: {_first_line(error)}")
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

    def blame(self, doing: str, error: Exception) -> None:
        """Makes the row a failed one, but lets it be timed on."""
        if self.status == "ok":
            self.status, self.reason = "failed", f"{doing}: {_first_line(error)}"
            say(f"failed: {self.workload.name}, {self.implementation.name}: {self.reason}")

    def repetitions(self, wanted: int) -> int:
        """As many as wanted, or as time allows."""
        affordable = int(SECONDS_A_MEASUREMENT / max(self.seconds, 1e-9))
        return min(wanted, max(affordable, FEWEST))


Table = Sequence[Sequence[Row]]  # the rows of each workload


def say(message: str) -> None:
    """Prints a line that stays, above a progress bar too."""
    print(message, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:500]


def check(step: Step, reference: Any) -> None:
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


def why_not(workload: Workload, implementation: Implementation) -> str | None:
    """Why a row is not worth trying, or None."""
    if implementation.needs_gpu and not results.has_gpu():
        return "needs an NVIDIA GPU"
    if reason := implementation.refuses(workload):
        return reason
    if implementation.framework == "torch" and results.version("torch") is None:
        return "PyTorch is not installed"
    if min(workload.lengths) < workload.T:
        return f"a row of L={min(workload.lengths)} has no room for the step's {workload.T} tokens"
    codes = workload.B * workload.K * workload.config.num_subspaces * workload.capacity
    # The codes twice, and float64 scores of one head at least. What is on the device can be tried.
    needed, there = 2 * codes + 8 * workload.capacity, results.host_bytes()
    if needed > there:
        return f"needs {needed / 2**30:.1f} GiB or more, this machine has {there / 2**30:.1f} GiB"
    return None


def plan_of(kind: str, name: str, table: Table, measure: Callable[[Plan], Iterator[None]]) -> Plan:
    """The plan of a table of rows; see `Plan`."""
    shapes = {rows[0].workload.name: results.shape_of(rows[0].workload) for rows in table}
    rows = lambda: [row.json() for rows in table for row in rows]  # noqa: E731
    return Plan(kind, name, rows, measure, {"workloads": shapes})


def open_clock(plan: Plan) -> KernelClock | None:
    """The kernel clock of a run; None without a GPU, or where PyTorch's profiler sees nothing."""
    if not results.has_gpu():
        say("No NVIDIA GPU: wall-clock times only.")
        return None
    try:
        return KernelClock()
    except Exception as error:
        plan.failed(f"no kernel times, which PyTorch's profiler records: {_first_line(error)}")
        return None


def measure_all(table: Table, settings: Settings) -> Iterator[None]:
    """Compiles, checks and times the rows of all workloads; yields after each of them."""
    rows = [row for of_workload in table for row in of_workload]
    for row in rows:
        with row.attempt("looking at sizes"):
            if reason := why_not(row.workload, row.implementation):
                row.give_up("skipped", reason)
    with progress(2 * sum(row.status == "ok" for row in rows)) as advance:
        compile_programs(rows, settings, advance)
        for of_workload in table:
            measure(of_workload, settings, advance)
            yield


def compile_programs(
    rows: Sequence[Row], settings: Settings, advance: Callable[[str], None]
) -> None:
    """Compiles all JAX programs of a run at once, on all cores, before anything is timed."""
    rows = [row for row in rows if row.status == "ok"]
    with jax_steps.compilers() as pool:
        forms = Forms(pool, settings.calls, settings.clock is not None, settings.chains)
        try:
            for row in rows:
                if trace := row.implementation.programs:
                    with row.attempt("tracing"):
                        row.programs = trace(row.workload, forms)
            for row in rows:
                advance(f"compiling {row.workload.name}: {row.implementation.name}")
                for name, program in row.programs.items():
                    # A row does without a chain; what became of it is said when it is to run.
                    with row.attempt(f"compiling a {name}", needed=name != "chain"):
                        program.wait()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure(rows: Sequence[Row], settings: Settings, advance: Callable[[str], None]) -> None:
    """Checks and times the rows of one workload; what fails is in its row."""
    rows = [row for row in rows if row.status == "ok"]
    if not rows:
        return
    workload = rows[0].workload
    try:
        reference = settings.reference(workload)
    except Exception as error:
        for row in rows:
            with row.attempt("making inputs"):
                raise error
        return
    for row in rows:
        advance(f"{workload.name}: {row.implementation.name}")
        with row.attempt("building"):
            prepare(row, reference, settings)
    gc.collect()  # Once, since none is collected while times are taken.
    ready = [row for row in rows if row.step is not None]
    with clocks.no_garbage_collection():
        if settings.clock is not None:
            for cache in ("cold", "warm"):
                time_kernels(ready, cache, settings.clock, settings.repetitions)
        if settings.calls:
            time_calls(ready, settings.repetitions)
        if settings.chains:
            time_chains(ready, reference, settings.repetitions)
    for row in rows:
        row.step, row.programs, row.done = None, {}, True
    del reference, ready  # what they have on the device is needed for the next
    gc.collect()
    if "torch" in sys.modules:
        torch_steps.release()


def prepare(row: Row, reference: Any, settings: Settings) -> None:
    """Builds a step, warms it up and checks its output, in both of its forms."""
    step = row.implementation.build(reference, row.programs)
    launches = [step.call_recorded] if settings.clock is not None else []
    if settings.calls:  # Last, so that `seconds` is that of a user's call.
        launches.append(step.call)
    for launch in launches:
        for _ in range(WARM_UPS):
            start = time.perf_counter()
            launch()
            step.wait()
            row.seconds = time.perf_counter() - start
        check(step, reference)
    row.step = step
    row.numbers |= step.numbers
    if settings.clock is None and results.has_gpu():
        row.reason = "no kernel times"
    if settings.ceilings is not None:
        row.numbers["floor"] = floor(row.implementation.work(row.workload), settings.ceilings)


def turns(wanted: int, rounds: int, shortest: int = 1) -> list[int]:
    """How many calls of a row come in each round: fewer rounds rather than too short ones."""
    rounds = max(min(rounds, wanted // shortest), 1)
    each, more = divmod(wanted, rounds)
    return [each + (turn < more) for turn in range(rounds)] if wanted else []


def kernel_turns(row: Row, cache: str, repetitions: Repetitions) -> list[int]:
    """Calls in each round whose kernels are recorded."""
    if cache == "cold":
        wanted = row.repetitions(repetitions.cold)
    elif row.implementation.pipeline:
        wanted = repetitions.pipeline
    else:
        wanted = row.repetitions(repetitions.warm)
    return turns(wanted, repetitions.rounds, SHORTEST_STREAM)


def time_kernels(
    rows: Sequence[Row], cache: str, clock: KernelClock, repetitions: Repetitions
) -> None:
    """Kernel times of all rows, with a "cold" or a "warm" L2 cache, round by round."""
    plans = {row: kernel_turns(row, cache, repetitions) for row in rows}
    calls: dict[Row, list[list[Kernel]]] = {row: [] for row in rows}
    for turn in range(max(map(len, plans.values()), default=0)):
        taking = {
            row: plan[turn]
            for row, plan in plans.items()
            if row.step is not None and turn < len(plan)
        }
        for row, found in record_turn(taking, clock, cache == "cold").items():
            calls[row] += found
    for row, found in calls.items():
        if row.step is None or not found:
            continue
        row.numbers[cache] = summary([sum(x.duration for x in kernels) for kernels in found])
        if cache == "warm":
            row.numbers["launches"] = int(np.median([len(kernels) for kernels in found]))
            row.numbers["stages"] = time_by_stage(found, row.implementation.framework)


def record_turn(
    taking: dict[Row, int], clock: KernelClock, cold: bool
) -> dict[Row, list[list[Kernel]]]:
    """Records one round of streams: the kernels of each call of the rows that it went well with."""

    def safely(row: Row, name: str) -> None:
        with row.attempt("recording kernels"):
            if row.step is not None:
                getattr(row.step, name)()

    streams = [
        Stream(
            functools.partial(safely, row, "call_recorded"),
            functools.partial(safely, row, "wait"),
            row.implementation.framework,
            count,
        )
        for row, count in taking.items()
    ]
    found = {}
    try:
        recorded = clock.record(streams, cold=cold)
    except Exception as error:
        for row in taking:
            row.blame("kernel times", error)
        return {}
    for (row, count), kernels in zip(taking.items(), recorded, strict=True):
        if row.step is not None:
            try:
                found[row] = clocks.cut(kernels, count, cold=cold)
            except ClockError as error:
                row.blame("kernel times", error)
    return found


def time_calls(rows: Sequence[Row], repetitions: Repetitions) -> None:
    """Wall-clock times: synchronised after each call, and after many."""
    kinds: dict[str, tuple[int, Callable[[Step, int], list[float]]]] = {
        "call": (repetitions.calls, clocks.synchronised),
        "amortised": (repetitions.amortised, lambda step, n: [clocks.amortised(step, n)]),
    }
    for kind, (wanted, timing) in kinds.items():
        plans = {row: turns(row.repetitions(wanted), repetitions.rounds) for row in rows}
        samples: dict[Row, list[float]] = {row: [] for row in rows}
        for turn in range(repetitions.rounds):
            for row, plan in plans.items():
                with row.attempt(f"timing ({kind})"):
                    if row.step is not None and turn < len(plan):
                        samples[row] += timing(row.step, plan[turn])
        for row in rows:
            if row.step is not None and samples[row]:
                row.numbers[kind] = summary(samples[row])


def time_chains(rows: Sequence[Row], reference: Any, repetitions: Repetitions) -> None:
    """Wall-clock time of a step among others inside one jit, which uses up its lists there."""
    chains: dict[Row, Step] = {}
    for row in rows:
        with row.attempt("running a chain of steps", needed=False):
            # Where launches take no part of the time, a chain shows nothing new.
            slow = row.seconds * jax_steps.CHAIN_STEPS > SECONDS_A_MEASUREMENT
            if row.step is None or slow or (chain := row.step.chain()) is None:
                continue
            for _ in range(WARM_UPS):
                chain.call()
                chain.wait()
            check(chain, reference)
            chains[row] = chain
    samples: dict[Row, list[float]] = {row: [] for row in chains}
    for _ in range(repetitions.rounds):
        for row, chain in chains.items():
            with row.attempt("timing a chain of steps"):
                if row.step is not None:
                    steps = chain.numbers["steps"]
                    count = -(-row.repetitions(repetitions.calls) // steps)
                    samples[row].append(clocks.amortised(chain, count) / steps)
    for row, found in samples.items():
        if row.step is not None and found:
            row.numbers["in_jit"] = summary(found)
