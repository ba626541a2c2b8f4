"""`python -m benchmarks run`: checks outputs, then times every implementation on every workload."""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import re
import shlex
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import clock as clocks
from benchmarks import implementations as steps
from benchmarks import machine
from benchmarks.agreement import Reference
from benchmarks.ceilings import Ceilings, dispatch_us, floor, measure_ceilings
from benchmarks.clock import ClockError, Kernel, KernelClock, summary
from benchmarks.implementations import IMPLEMENTATIONS, Implementation, Step
from benchmarks.workloads import SMALL, WORKLOADS, Workload, make_inputs

RESULTS = Path(__file__).parent / "results"
KNOWN = WORKLOADS | SMALL

FLOATS = ("float32", "bfloat16", "float16")

# Flags that change a workload: field, type or choices, what it is.
WORKLOAD_FLAGS = {
    "B": ("B", int, "batch rows"),
    "N": ("N", int, "query heads"),
    "K": ("K", int, "key/value heads"),
    "H": ("H", int, "head dimension"),
    "S": ("S", int, "capacity in tokens"),
    "L": ("L", int, "tokens in the cache, the step's own included: one number or one a row"),
    "dtype": ("dtype", FLOATS, "of queries, keys and codebooks"),
}
CONFIG_FLAGS = {
    "M": ("num_subspaces", int, "PQ subspaces"),
    "bits": ("num_bits", int, "bits of a code"),
    "heavy": ("heavy_size", int, "budget of tokens chosen by score"),
    "sink": ("sink_size", int, "first tokens, always attended"),
    "window": ("window_size", int, "last tokens, always attended"),
    "table-dtype": ("table_dtype", FLOATS, "what look-up table entries are rounded to"),
}

# What a sweep changes, and what it measures unless told otherwise.
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "length": [{"L": 2**exponent} for exponent in range(12, 21)],
    "batch": [{"B": 2**exponent} for exponent in range(7)],
    "subspaces": [
        {"M": subspaces, "bits": bits}
        for subspaces, bits in ((2, 6), (2, 8), (4, 8), (8, 6), (8, 8), (16, 8), (32, 8))
    ],
}
SWEEP_BASE = "llama-32k"
SWEEP_TORCH = ("torch:eager", "torch:iteration4")

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


QUICK = Repetitions(kernels=5, calls=8, amortised=20, rounds=2)


@dataclasses.dataclass
class Row:
    """One implementation on one workload: what comes out of it.

    Attributes:
      workload: what is run.
      implementation: what runs it.
      step: while it is ready to be timed.
      status: "ok", "skipped" or "failed".
      reason: of the latter two.
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
    def attempt(self, doing: str) -> Iterator[None]:
        """Keeps what goes wrong inside to this row."""
        try:
            yield
        except NotImplementedError as error:
            self.give_up("skipped", str(error))
        except AssertionError as error:
            self.give_up("failed", f"wrong output: {error}")
        except Exception as error:
            if is_out_of_memory(error):
                self.give_up("skipped", f"out of memory while {doing}: {_first_line(error)}")
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether a framework ran out of device memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "RESOURCE_EXHAUSTED" in str(error)
        or "out of memory" in str(error).lower()
    )


# What to run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `run`."""
    parser.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        help=f"default: all of {', '.join(WORKLOADS)}; also {', '.join(SMALL)}",
    )
    parser.add_argument(
        "--implementation",
        nargs="+",
        metavar="NAME",
        help=f"default: all that run here of {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument("--sweep", choices=SWEEPS, help=f"vary a size, of {SWEEP_BASE} by default")
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--repeats", type=int, metavar="COUNT", help="calls with kernels recorded")
    parser.add_argument(
        "--clock",
        choices=["auto", *clocks.RECORDERS],
        default="auto",
        help="profiler that records kernels",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/")
    parser.add_argument("--commit", help="for a machine without the history; may end in -dirty")
    sizes = parser.add_argument_group("change the workloads")
    for flag, (_, kind, meaning) in (WORKLOAD_FLAGS | CONFIG_FLAGS).items():
        values: dict[str, Any] = {"choices": kind} if kind is FLOATS else {"type": kind}
        if flag == "L":
            values["nargs"] = "+"
        sizes.add_argument(f"--{flag}", help=meaning, **values)
    sizes.add_argument(
        "--weights", action=argparse.BooleanOptionalAction, help="write the dense weight rows"
    )


def chosen_workloads(arguments: argparse.Namespace) -> list[Workload]:
    """The workloads of a command line.

    Raises:
      ValueError: for unknown names, and for sizes that contradict each other.
    """
    names = arguments.workload or ([SWEEP_BASE] if arguments.sweep else list(WORKLOADS))
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(
            f"--workload: expected names of {', '.join(KNOWN)}, got {', '.join(unknown)}"
        )
    changes = {
        flag: value
        for flag in (*WORKLOAD_FLAGS, *CONFIG_FLAGS, "weights")
        if (value := getattr(arguments, flag.replace("-", "_"))) is not None
    }
    points = SWEEPS[arguments.sweep] if arguments.sweep else [{}]
    return [changed(KNOWN[name], changes | point) for name in names for point in points]


def changed(workload: Workload, changes: dict[str, Any]) -> Workload:
    """The workload with some sizes changed; its name is then what the command line takes."""
    fields: dict[str, Any] = {}
    config: dict[str, Any] = {}
    words = [workload.name]
    for flag, value in changes.items():
        if flag == "weights":
            fields["weights"] = value
            words.append("--weights" if value else "--no-weights")
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{flag}", *map(str, values)]
        if flag == "L":
            value = values[0] if len(values) == 1 else tuple(values)
        if flag in WORKLOAD_FLAGS:
            fields[WORKLOAD_FLAGS[flag][0]] = value
        else:
            config[CONFIG_FLAGS[flag][0]] = value
    if not changes:
        return workload
    return dataclasses.replace(
        workload,
        name=" ".join(words),
        config=dataclasses.replace(workload.config, **config),
        **fields,
    )


def chosen_implementations(arguments: argparse.Namespace, gpu: bool) -> list[Implementation]:
    """The implementations of a command line.

    Raises:
      ValueError: for unknown names.
    """
    if arguments.implementation:
        unknown = [name for name in arguments.implementation if name not in IMPLEMENTATIONS]
        if unknown:
            raise ValueError(
                f"--implementation: expected names of {', '.join(IMPLEMENTATIONS)}, "
                f"got {', '.join(unknown)}"
            )
        return [IMPLEMENTATIONS[name] for name in dict.fromkeys(arguments.implementation)]
    chosen = [x for x in IMPLEMENTATIONS.values() if gpu or not (x.needs_gpu or x.peer)]
    if arguments.sweep:
        chosen = [x for x in chosen if x.name.startswith("jax:") or x.name in SWEEP_TORCH]
    return [x for x in chosen if x.framework == "jax" or machine.version("torch")]


def chosen_repetitions(arguments: argparse.Namespace) -> Repetitions:
    """How often a command line wants things timed.

    Raises:
      ValueError: for a number below 1.
    """
    repetitions = QUICK if arguments.quick else Repetitions()
    if arguments.repeats is None:
        return repetitions
    if arguments.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {arguments.repeats}")
    return dataclasses.replace(repetitions, kernels=arguments.repeats, all_kernels=True)


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


# Measuring


@dataclasses.dataclass(frozen=True)
class Session:
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
    workload: Workload, implementations: Sequence[Implementation], session: Session
) -> list[Row]:
    """Checks and times implementations on one workload; what fails is in its row."""
    rows = [Row(workload, implementation) for implementation in implementations]
    for row in rows:
        with row.attempt("looking at sizes"):
            if reason := why_not(workload, row.implementation, session.gpu):
                row.give_up("skipped", reason)
    if not any(row.status == "ok" for row in rows):
        return rows
    try:
        with session.phase(workload, "inputs"):
            reference = Reference(workload, make_inputs(workload))
    except Exception as error:
        traceback.print_exc()
        for row in rows:
            if row.status == "ok":
                row.give_up("failed", f"making inputs: {type(error).__name__}: {error}")
        return rows
    with session.phase(workload, "building and checking"):
        for row in rows:
            session.advance(f"{workload.name}: {row.implementation.name}")
            if row.status == "ok":
                with row.attempt("building"):
                    prepare(row, reference, session)
    session.advance(f"{workload.name}: timing")
    ready = [row for row in rows if row.step is not None]
    if session.clock is not None:
        with session.phase(workload, "kernels"):
            time_kernels(ready, session)
    with session.phase(workload, "calls"):
        time_calls(ready, session)
    if session.chains:
        with session.phase(workload, "chains"):
            time_chains(ready, reference, session)
    for row in rows:
        row.step = None
    steps.release()
    return rows


def prepare(row: Row, reference: Reference, session: Session) -> None:
    """Builds a step, warms it up and checks its output."""
    step = row.implementation.build(reference)
    for _ in range(WARM_UPS):
        step.call()
        step.wait()
    start = time.perf_counter()
    step.call()
    step.wait()
    row.seconds = time.perf_counter() - start
    step.check(reference)
    row.step = step
    row.numbers["compile_seconds"] = step.compile_seconds
    row.numbers["memory_bytes"] = step.memory_bytes
    if session.ceilings is not None:
        row.numbers["floor"] = floor(row.implementation.work(row.workload), session.ceilings)


def in_turns(rows: Sequence[Row], repetitions: Repetitions) -> list[Row]:
    """The rows round-robin, each as often as it can afford."""
    wanted = repetitions.kernels
    counts = {
        id(row): wanted if repetitions.all_kernels else row.repetitions(wanted) for row in rows
    }
    return [row for turn in range(wanted) for row in rows if turn < counts[id(row)]]


def time_kernels(rows: Sequence[Row], session: Session) -> None:
    """Kernel times of all rows, with cold and with warm L2 cache."""

    def call(row: Row) -> None:
        with row.attempt("recording kernels"):
            if row.step is not None:
                row.step.call()
                row.step.wait()

    for cache in ("cold", "warm"):
        order = in_turns(rows, session.repetitions)
        calls = [functools.partial(call, row) for row in order]
        try:
            recorded = session.clock.measure(calls, cold=cache == "cold")
        except Exception as error:
            traceback.print_exc()
            for row in rows:
                row.give_up("failed", f"kernel times: {type(error).__name__}: {error}")
            return
        for row in rows:
            of_row = [kernels for r, kernels in zip(order, recorded, strict=True) if r is row]
            if row.step is None:
                continue
            if not all(of_row):
                row.give_up("failed", f"{session.clock.name} recorded a call without kernels")
                continue
            totals = [sum(kernel.duration for kernel in kernels) for kernels in of_row]
            row.numbers[cache] = summary(totals)
            if cache == "warm":
                row.numbers["launches"] = int(np.median([len(kernels) for kernels in of_row]))
                row.numbers["breakdown"] = breakdown(of_row, row.implementation.framework)


def time_calls(rows: Sequence[Row], session: Session) -> None:
    """Wall-clock times: synchronised, between CUDA events, and amortised."""
    kinds: dict[str, tuple[int, Callable[[Step, int], list[float]]]] = {
        "call": (session.repetitions.calls, clocks.synchronised),
        "amortised": (session.repetitions.amortised, lambda step, n: [clocks.amortised(step, n)]),
    }
    if session.gpu:
        kinds["event"] = (session.repetitions.calls, clocks.between_events)
    for kind, (wanted, timing) in kinds.items():
        samples: dict[int, list[float]] = {id(row): [] for row in rows}
        for _ in range(session.repetitions.rounds):
            for row in rows:
                if kind == "event" and row.implementation.framework != "torch":
                    continue
                count = -(-row.repetitions(wanted) // session.repetitions.rounds)
                with row.attempt(f"timing ({kind})"):
                    if row.step is not None:
                        samples[id(row)] += timing(row.step, count)
                        if kind == "amortised":
                            calls = row.numbers.get("amortised_calls", 0)
                            row.numbers["amortised_calls"] = calls + count
        for row in rows:
            if row.step is not None and samples[id(row)]:
                row.numbers[kind] = summary(samples[id(row)])


def time_chains(rows: Sequence[Row], reference: Reference, session: Session) -> None:
    """Wall-clock time a step inside one larger jit."""
    chains = []
    for row in rows:
        with row.attempt("compiling a chain of steps"):
            # Where launches take no part of the time, a chain shows nothing new.
            slow = row.seconds * steps.CHAIN_STEPS > SECONDS_A_MEASUREMENT
            if row.step is None or (slow and session.gpu):
                continue
            if (chain := row.step.chain()) is not None:
                for _ in range(WARM_UPS):
                    chain.call()
                    chain.wait()
                chain.check(reference)
                row.numbers["chain_compile_seconds"] = chain.compile_seconds
                chains.append((row, chain, []))
    for _ in range(session.repetitions.rounds):
        for row, chain, samples in chains:
            with row.attempt("timing a chain of steps"):
                if row.step is not None:
                    count = -(-row.repetitions(session.repetitions.calls) // chain.steps)
                    samples.append(clocks.amortised(chain, count) / chain.steps)
    for row, chain, samples in chains:
        if row.step is not None:
            row.numbers["in_jit"] = summary(samples) | {"steps": chain.steps}


# Kernels by what they are for. A sort right after a top-k is part of it: torch.topk sorts what it
# found.
TORCH_GROUPS = (
    ("top-k", re.compile(r"top_?k|radixfind|devicescan|blockwise", re.IGNORECASE)),
    ("score", re.compile(r"score_kernel|gemm|gemv|cutlass|gather|scatter_gather", re.IGNORECASE)),
    ("index generation", re.compile(r"sparse_ind|scatter", re.IGNORECASE)),
    ("sort", re.compile(r"sort", re.IGNORECASE)),
)


def short_name(name: str) -> str:
    """A kernel's name without return type, template arguments, parameters and numbering."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.split(r"[<(]", name, maxsplit=1)[0].strip()
    return re.sub(r"(_\d+)+$", "", name) or name


def groups_of(kernels: Sequence[Kernel], framework: str) -> list[str]:
    """What each kernel of a call is for: the stages of the original; JAX's by their names."""
    if framework == "jax":
        return [short_name(kernel.name) for kernel in kernels]
    groups: list[str] = []
    for kernel in kernels:
        found = (group for group, pattern in TORCH_GROUPS if pattern.search(kernel.name))
        group = next(found, "other")
        if group == "sort" and groups and groups[-1] == "top-k":
            group = "top-k"
        groups.append(group)
    return groups


def breakdown(calls: Sequence[Sequence[Kernel]], framework: str) -> list[dict[str, Any]]:
    """Median time a call of each kernel, the longest first."""
    times: dict[tuple[str, str], list[float]] = {}
    launches: dict[tuple[str, str], int] = {}
    for number, kernels in enumerate(calls):
        for kernel, group in zip(kernels, groups_of(kernels, framework), strict=True):
            key = (group, short_name(kernel.name))
            times.setdefault(key, [0.0] * len(calls))[number] += kernel.duration
            launches[key] = launches.get(key, 0) + 1
    parts = [
        {
            "group": group,
            "kernel": name,
            "launches": launches[group, name] / len(calls),
            "us": float(np.median(samples)),
        }
        for (group, name), samples in times.items()
    ]
    return sorted(parts, key=lambda part: -part["us"])


# The run


def shape_of(workload: Workload) -> dict[str, Any]:
    """A workload's sizes, for a results file."""
    sizes = dataclasses.asdict(workload)
    config = sizes.pop("config")
    config["table_dtype"] = np.dtype(config["table_dtype"]).name
    config["init_offset"] = int(config["init_offset"])
    return sizes | {"S": workload.capacity, "config": config}


def row_json(row: Row, sweep: str | None) -> dict[str, Any]:
    """A row, for a results file."""
    return {
        "workload": row.workload.name,
        "shape": shape_of(row.workload),
        "sweep": sweep,
        "implementation": row.implementation.name,
        "framework": row.implementation.framework,
        "peer": row.implementation.peer,
        "status": row.status,
        "reason": row.reason,
        "command": row.command,
        **row.numbers,
    }


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; lines where rich is not installed."""
    try:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
    except ImportError:
        started = time.perf_counter()
        count = iter(range(1, total + 1))
        yield lambda what: say(
            f"[{next(count, total)}/{total}, {time.perf_counter() - started:.0f} s] {what}"
        )
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what: bar.update(task, advance=1, description=what)


def default_output(arguments: argparse.Namespace, device: str, stamp: str) -> Path:
    """Where results go: the device, what was run, and when."""
    if arguments.sweep:
        what = f"sweep-{arguments.sweep}"
    else:
        what = "-".join(arguments.workload or ["named"])
    if arguments.quick:
        what = f"quick-{what}"
    slug = re.sub(r"[^a-z0-9]+", "-", f"{device} {what}".lower()).strip("-")[:80].strip("-")
    return RESULTS / f"{slug}-{stamp}.json"


def run(arguments: argparse.Namespace) -> int:
    """Runs what the command line asks for and writes a results file.

    Returns:
      0, or 1 if anything failed.
    """
    started = time.perf_counter()
    gpu = machine.has_gpu()
    try:
        workloads = chosen_workloads(arguments)
        implementations = chosen_implementations(arguments, gpu)
        repetitions = chosen_repetitions(arguments)
    except ValueError as error:
        arguments.parser.error(str(error))

    now = datetime.datetime.now(datetime.UTC)
    about = machine.describe_machine()
    commit = machine.find_commit(arguments.commit)
    if commit["commit"] is None:
        say("The commit is not known here: give it with --commit, or the results cannot name it.")
    failures = 0
    clock = ceilings = None
    if not gpu:
        say("No NVIDIA GPU: XLA and eager PyTorch only, by wall-clock time.")
    else:
        try:
            before = dispatch_us()
            clock = clocks.open_kernel_clock(arguments.clock)
            ceilings = measure_ceilings(clock, before)
        except ClockError as error:
            failures += 1
            say(f"failed: no kernel times, since no profiler records this process: {error}")
        except Exception as error:
            failures += 1
            traceback.print_exc()
            say(f"failed: ceilings: {type(error).__name__}: {error}")

    output = arguments.output or default_output(
        arguments, str(about["device"]), now.strftime("%Y%m%d-%H%M%S")
    )
    results: dict[str, Any] = {
        "kind": "sweep" if arguments.sweep else "named",
        "time": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", "run", *arguments.argv]),
        **commit,
        "machine": about,
        "quick": arguments.quick,
        "kernel_clock": clock.name if clock else None,
        "ceilings": dataclasses.asdict(ceilings) if ceilings else None,
        "rows": [],
    }
    with progress(len(workloads) * (len(implementations) + 1)) as advance:
        # A sweep is about kernels; a chain would be compiled anew for each of its points.
        session = Session(gpu, clock, ceilings, repetitions, not arguments.sweep, advance)
        for workload in workloads:
            rows = measure(workload, implementations, session)
            failures += sum(row.status == "failed" for row in rows)
            results["rows"] += [row_json(row, arguments.sweep) for row in rows]
            results["seconds"] = round(time.perf_counter() - started, 1)
            results["seconds_by_phase"] = session.seconds
            # After each workload, so that an interrupted run keeps what it has.
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")

    from benchmarks.report import print_results

    print_results(results)
    say(f"{output} ({results['seconds']:.0f} s)")
    if failures:
        say(f"{failures} failed")
    return 1 if failures else 0
