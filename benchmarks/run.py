"""`python -m benchmarks run`: measures workloads and writes a results file."""

import argparse
import contextlib
import dataclasses
import datetime
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import clock as clocks
from benchmarks import machine
from benchmarks.ceilings import Ceilings, dispatch_us, measure_ceilings
from benchmarks.choice import (
    add_arguments,
    chosen_implementations,
    chosen_points,
    chosen_repetitions,
    timing_flags,
)
from benchmarks.clock import ClockError, KernelClock
from benchmarks.files import chosen_output, repeatable_command, write
from benchmarks.measure import Row, Settings, compile_programs, look_at_sizes, measure, say
from benchmarks.tables import Results, print_results
from parity.inputs import Workload

__all__ = ["add_arguments", "run"]


def shape_of(workload: Workload) -> dict[str, Any]:
    """A workload's sizes, for a results file."""
    sizes = dataclasses.asdict(workload)
    config = sizes.pop("config")
    config["table_dtype"] = np.dtype(config["table_dtype"]).name
    config["init_offset"] = workload.config.first_trained
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
        "status": row.status if row.done or row.status != "ok" else "skipped",
        "reason": row.reason if row.done or row.status != "ok" else "not measured yet",
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


def default_output(arguments: argparse.Namespace, device: str, stamp: str) -> str:
    """Name of the results file: the device, what was run, and when."""
    if arguments.sweep:
        what = f"sweep-{arguments.sweep}"
    else:
        what = "-".join(arguments.workload or ["named"])
    if arguments.quick:
        what = f"quick-{what}"
    slug = re.sub(r"[^a-z0-9]+", "-", f"{device} {what}".lower()).strip("-")[:80].strip("-")
    return f"{slug}-{stamp}.json"


def open_clock(choice: str) -> tuple[KernelClock | None, Ceilings | None, int]:
    """The kernel clock and the ceilings it measures; None for what failed, and how many did."""
    clock = None
    try:
        before = dispatch_us()
        clock = clocks.open_kernel_clock(choice)
        return clock, measure_ceilings(clock, before), 0
    except ClockError as error:
        say(f"failed: no kernel times, since no profiler records this process: {error}")
    except Exception as error:
        traceback.print_exc()
        say(f"failed: ceilings: {type(error).__name__}: {error}")
    return clock, None, 1


def run(arguments: argparse.Namespace) -> int:
    """Runs what the command line asks for and writes a results file.

    Returns:
      0, or 1 if anything failed or nothing was measured, or 130 if the user interrupted it.
    """
    started = time.perf_counter()
    gpu = machine.has_gpu()
    try:
        points = chosen_points(arguments)
        implementations = chosen_implementations(arguments, gpu)
    except ValueError as error:
        arguments.parser.error(str(error))

    now = datetime.datetime.now(datetime.UTC)
    about = machine.describe_machine()
    commit = machine.find_commit(arguments.commit)
    if commit["commit"] is None:
        say("The commit is not known here: give it with --commit, or the results cannot name it.")
    default = default_output(arguments, str(about["device"]), now.strftime("%Y%m%d-%H%M%S"))
    output = chosen_output(arguments.output, default, arguments.parser)
    clock, ceilings, failures = None, None, 0
    if gpu:
        clock, ceilings, failures = open_clock(arguments.clock)
    else:
        say("No NVIDIA GPU: XLA and eager PyTorch only, by wall-clock time.")

    options = timing_flags(arguments)
    table = [
        (point, [Row(point.workload, one, options) for one in implementations]) for point in points
    ]
    about_run: dict[str, Any] = {
        "kind": "sweep" if arguments.sweep else "named",
        "time": now.isoformat(timespec="seconds"),
        "command": repeatable_command(arguments.argv, "benchmarks run"),
        **commit,
        "machine": about,
        "quick": arguments.quick,
        "kernel_clock": clock.name if clock else None,
        "ceilings": dataclasses.asdict(ceilings) if ceilings else None,
    }
    with progress(len(points) * (2 * len(implementations) + 1)) as advance:
        # A sweep is about kernels, where they can be timed.
        settings = Settings(
            gpu,
            clock,
            ceilings,
            chosen_repetitions(arguments),
            chains=not arguments.sweep,
            calls=not arguments.sweep or clock is None,
            advance=advance,
        )

        def save() -> Results:
            results = about_run | {
                "seconds": round(time.perf_counter() - started, 1),
                "seconds_by_phase": settings.seconds,
                "rows": [row_json(row, point.sweep) for point, rows in table for row in rows],
            }
            write(output, results)
            return results

        interrupted = measure_all([rows for _, rows in table], settings, save)
        results = save()

    print_results(results)
    say(f"{output} ({results['seconds']:.0f} s)")
    failures += sum(row["status"] == "failed" for row in results["rows"])
    if failures:
        say(f"{failures} failed")
    if interrupted:
        say("interrupted: what was measured until then is kept")
        return 130
    if not any(row["status"] == "ok" for row in results["rows"]):
        say("nothing was measured; the table says why")
        return 1
    return 1 if failures else 0


def measure_all(
    table: Sequence[Sequence[Row]], settings: Settings, save: Callable[[], object]
) -> bool:
    """Compiles and measures the rows of all workloads.

    Args:
      table: rows of each workload.
      settings: of the run.
      save: called after each workload, so that a run that is killed keeps what it has.

    Returns:
      Whether the user interrupted it.
    """
    rows = [row for of_workload in table for row in of_workload]
    try:
        look_at_sizes(rows, settings)
        compile_programs(rows, settings)
        for of_workload in table:
            measure(of_workload, settings)
            save()
    except KeyboardInterrupt:
        for row in rows:
            if row.status == "ok" and not row.done:
                row.status, row.reason = "skipped", "interrupted"
        return True
    return False
