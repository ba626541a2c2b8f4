"""`python -m benchmarks run`: measures workloads and writes a results file."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import re
import shlex
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import clock as clocks
from benchmarks import machine
from benchmarks.ceilings import dispatch_us, measure_ceilings
from benchmarks.choice import (
    add_arguments,
    chosen_implementations,
    chosen_repetitions,
    chosen_workloads,
)
from benchmarks.clock import ClockError
from benchmarks.measure import Row, Settings, measure, say
from benchmarks.report import print_results
from benchmarks.workloads import Workload

__all__ = ["add_arguments", "run"]

RESULTS = Path(__file__).parent / "results"


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


def repeatable_command(arguments: argparse.Namespace) -> str:
    """The command line, less where its results went: that is no part of what was measured."""
    argv = list(arguments.argv)
    if "--output" in argv:
        at = argv.index("--output")
        del argv[at : at + 2]
    return shlex.join(["python", "-m", "benchmarks", "run", *argv])


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
        "command": repeatable_command(arguments),
        **commit,
        "machine": about,
        "quick": arguments.quick,
        "kernel_clock": clock.name if clock else None,
        "ceilings": dataclasses.asdict(ceilings) if ceilings else None,
        "rows": [],
    }
    with progress(len(workloads) * (len(implementations) + 1)) as advance:
        # A sweep is about kernels; a chain would be compiled anew for each of its points.
        settings = Settings(gpu, clock, ceilings, repetitions, not arguments.sweep, advance)
        for workload in workloads:
            rows = measure(workload, implementations, settings)
            failures += sum(row.status == "failed" for row in rows)
            results["rows"] += [row_json(row, arguments.sweep) for row in rows]
            results["seconds"] = round(time.perf_counter() - started, 1)
            results["seconds_by_phase"] = settings.seconds
            # After each workload, so that an interrupted run keeps what it has.
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")

    print_results(results)
    say(f"{output} ({results['seconds']:.0f} s)")
    if failures:
        say(f"{failures} failed")
    return 1 if failures else 0
