"""One workload: outputs checked, then all implementations timed in turns."""

import contextlib
import dataclasses
import functools
import gc
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
from benchmarks.clock import Kernel, KernelClock, Stream, summary
from benchmarks.implementations import Implementation, Programs, Step
from benchmarks.programs import Forms, compilers
from benchmarks.stages import breakdown
from parity.inputs import Workload, make_inputs

WARM_UPS = 3  # XLA records command buffers in the first calls.

# Repetitions end where a measurement of one implementation would take longer than this; what is
# so slow that FEWEST take longer has those.
SECONDS_A_MEASUREMENT = 0.2
FEWEST = 5
SHORTEST_STREAM = 10  # calls: with fewer in a row the lead takes too large a part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repetitions:
    """How often things are timed; all of it in turns between the implementations.

    Attributes:
      pipeline: calls of our pipelines whose kernels are recorded with a warm cache, however long
        they take.
      warm: calls of the others.
      cold: calls whose kernels are recorded with a flushed cache.
      calls: synchronised calls.
      amortised: calls in all, for the amortised time.
      rounds: turns that all of these are divided into.
    """

    pipeline: int = 1000
    warm: int = 50
    cold: int = 30
    calls: int = 50
    amortised: int = 200
    rounds: int = 10


QUICK = Repetitions(pipeline=20, warm=10, cold=5, calls=8, amortised=20, rounds=2)


class WrongOutput(Exception):
    """An implementation did not select what it should."""


@dataclasses.dataclass
class Row:
    """One implementation on one workload: what comes out of it.

    Attributes:
      workload: what is run.
      implementation: what runs it.
      options: flags of the command line that change how often and by what it is timed.
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
    options: str = ""
    programs: Programs = dataclasses.field(default_factory=dict)
    step: Step | None = None
    done: bool = False
    status: str = "ok"
    reason: str | None = None
    seconds: float = 0.0
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def command(self) -> str:
        """What repeats this row."""
        return (
            f"python -m benchmarks run --workload {self.workload.name} "
            f"--implementation {self.implementation.name}{self.options}"
        )

    def give_up(self, status: str, reason: str) -> None:
        """Takes the row out of what follows."""
        self.status, self.reason, self.step, self.programs = status, reason, None, {}
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

    @contextlib.contextmanager
    def keep(self, doing: str) -> Iterator[None]:
        """Makes the row a failed one if something goes wrong inside, but lets it be timed on."""
        try:
            yield
        except Exception as error:
            if self.status == "ok":
                self.status, self.reason = "failed", f"{doing}: {_first_line(error)}"
                say(f"failed: {self.workload.name}, {self.implementation.name}: {self.reason}")

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
    if reason := implementation.refuses(workload):
        return reason
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
      calls: whether to time calls by the wall clock.
      advance: tells the user what is being done.
      seconds: what each phase of each workload took, filled by `measure`.
    """

    gpu: bool
    clock: KernelClock | None
    ceilings: Ceilings | None
    repetitions: Repetitions
    chains: bool
    calls: bool
    advance: Callable[[str], None]
    seconds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, workload: str, name: str) -> Iterator[None]:
        """Notes how long the inside takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = round(time.perf_counter() - start, 2)
            self.seconds.setdefault(workload, {})[name] = took


def look_at_sizes(rows: Sequence[Row], settings: Settings) -> None:
    """Takes out rows that are not worth trying."""
    for row in rows:
        with row.attempt("looking at sizes"):
            if reason := why_not(row.workload, row.implementation, settings.gpu):
                row.give_up("skipped", reason)


def compile_programs(rows: Sequence[Row], settings: Settings) -> None:
    """Compiles all JAX programs of a run at once, on all cores, before anything is timed."""
    compiled = [row for row in rows if row.status == "ok" and row.implementation.programs]
    pool = compilers()
    forms = Forms(
        pool,
        user=settings.calls,
        recorded=settings.clock is not None,
        chains=settings.chains,
    )
    try:
        with settings.phase("all", "tracing"):
            for row in compiled:
                with row.attempt("tracing"):
                    row.programs = row.implementation.programs(row.workload, forms)
        with settings.phase("all", "compiling"):
            for row in compiled:
                settings.advance(f"compiling {row.workload.name}: {row.implementation.name}")
                for name, program in row.programs.items():
                    # A row does without a chain; what became of it is said when it is to run.
                    with row.attempt(f"compiling a {name}", needed=name != "chain"):
                        program.wait()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def measure(rows: Sequence[Row], settings: Settings) -> None:
    """Checks and times the rows of one workload; what fails is in its row."""
    rows = [row for row in rows if row.status == "ok"]
    if not rows:
        return
    workload = rows[0].workload
    try:
        with settings.phase(workload.name, "inputs"):
            reference = Reference(workload, make_inputs(workload))
    except Exception as error:
        traceback.print_exc()
        for row in rows:
            row.give_up("failed", f"making inputs: {type(error).__name__}: {error}")
        return
    with settings.phase(workload.name, "building and checking"):
        for row in rows:
            settings.advance(f"{workload.name}: {row.implementation.name}")
            with row.attempt("building"):
                prepare(row, reference, settings)
    settings.advance(f"{workload.name}: timing")
    gc.collect()  # Once, since none is collected while times are taken.
    ready = [row for row in rows if row.step is not None]
    with clocks.no_garbage_collection():
        if settings.clock is not None:
            with settings.phase(workload.name, "kernels"):
                time_kernels(ready, settings.clock, settings.repetitions)
        if settings.calls:
            with settings.phase(workload.name, "calls"):
                time_calls(ready, settings)
        if settings.chains:
            with settings.phase(workload.name, "chains"):
                time_chains(ready, reference, settings)
    for row in rows:
        row.step, row.programs, row.done = None, {}, True
    steps.release()


def prepare(row: Row, reference: Reference, settings: Settings) -> None:
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
    row.numbers["compile_seconds"] = step.compile_seconds
    row.numbers["memory_bytes"] = step.memory_bytes
    if settings.ceilings is not None:
        row.numbers["floor"] = floor(row.implementation.work(row.workload), settings.ceilings)


def turns(wanted: int, rounds: int, shortest: int = 1) -> list[int]:
    """How many calls of a row come in each round: fewer rounds rather than too short ones."""
    rounds = max(min(rounds, wanted // shortest), 1)
    each, more = divmod(wanted, rounds)
    return [each + (turn < more) for turn in range(rounds)] if wanted else []


def time_kernels(rows: Sequence[Row], clock: KernelClock, repetitions: Repetitions) -> None:
    """Kernel times of all rows, with cold and with warm L2 cache."""
    for cache in ("cold", "warm"):
        calls: dict[int, list[list[Kernel]]] = {id(row): [] for row in rows}
        plans = {id(row): kernel_turns(row, cache, repetitions) for row in rows}
        for turn in range(max(map(len, plans.values()), default=0)):
            taking = [
                (row, plans[id(row)][turn])
                for row in rows
                if row.step is not None and turn < len(plans[id(row)])
            ]
            record_turn(taking, clock, cache == "cold", calls)
        for row in rows:
            if row.step is None or not calls[id(row)]:
                continue
            of_row = calls[id(row)]
            totals = [sum(kernel.duration for kernel in kernels) for kernels in of_row]
            row.numbers[cache] = summary(totals)
            if cache == "warm":
                row.numbers["launches"] = int(np.median([len(kernels) for kernels in of_row]))
                row.numbers["breakdown"] = breakdown(of_row, row.implementation.framework)


def kernel_turns(row: Row, cache: str, repetitions: Repetitions) -> list[int]:
    """Calls in each round whose kernels are recorded."""
    if cache == "cold":
        wanted = row.repetitions(repetitions.cold)
    elif row.implementation.pipeline:
        wanted = repetitions.pipeline
    else:
        wanted = row.repetitions(repetitions.warm)
    return turns(wanted, repetitions.rounds, SHORTEST_STREAM)


def record_turn(
    taking: Sequence[tuple[Row, int]],
    clock: KernelClock,
    cold: bool,
    calls: dict[int, list[list[Kernel]]],
) -> None:
    """Records one round of streams and adds the kernels of each row's calls to `calls`."""

    def launch(row: Row) -> None:
        with row.attempt("recording kernels"):
            if row.step is not None:
                row.step.call_recorded()

    def wait(row: Row) -> None:
        with row.attempt("recording kernels"):
            if row.step is not None:
                row.step.wait()

    streams = [
        Stream(
            functools.partial(launch, row),
            functools.partial(wait, row),
            row.implementation.framework,
            count,
        )
        for row, count in taking
    ]
    try:
        recorded = clock.record(streams, cold=cold)
        for (row, count), kernels in zip(taking, recorded, strict=True):
            if row.step is not None:
                with row.keep("kernel times"):
                    calls[id(row)] += clocks.cut(kernels, count, cold=cold)
    except Exception as error:
        for row, _ in taking:
            with row.keep("kernel times"):
                raise error


def time_calls(rows: Sequence[Row], settings: Settings) -> None:
    """Wall-clock times: synchronised, between CUDA events, and amortised."""
    repetitions = settings.repetitions
    kinds: dict[str, tuple[int, Callable[[Step, int], list[float]]]] = {
        "call": (repetitions.calls, clocks.synchronised),
        "amortised": (repetitions.amortised, lambda step, n: [clocks.amortised(step, n)]),
    }
    if settings.gpu:
        kinds["event"] = (repetitions.calls, clocks.between_events)
    for kind, (wanted, timing) in kinds.items():
        timed = [row for row in rows if kind != "event" or row.implementation.framework == "torch"]
        samples: dict[int, list[float]] = {id(row): [] for row in timed}
        plans = {id(row): turns(row.repetitions(wanted), repetitions.rounds) for row in timed}
        for turn in range(repetitions.rounds):
            for row in timed:
                with row.attempt(f"timing ({kind})"):
                    if row.step is not None and turn < len(plans[id(row)]):
                        samples[id(row)] += timing(row.step, plans[id(row)][turn])
        for row in timed:
            if row.step is not None and samples[id(row)]:
                row.numbers[kind] = summary(samples[id(row)])
                if kind == "amortised":
                    row.numbers["amortised_calls"] = sum(plans[id(row)])


def time_chains(rows: Sequence[Row], reference: Reference, settings: Settings) -> None:
    """Wall-clock time a step inside one larger jit."""
    chains = []
    for row in rows:
        with row.attempt("running a chain of steps", needed=False):
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
        if row.step is not None and samples:
            row.numbers["in_jit"] = summary(samples) | {"steps": chain.steps}
