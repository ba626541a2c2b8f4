"""`python -m benchmarks COMMAND`: measures what was checked first, and reports it."""

import os

# Both frameworks share the GPU, and JAX reads this when it first touches it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import build, decode, devices, host, layer, quality, report, results, run
from benchmarks.measure import say

COMMANDS = {
    "run": run,
    "layer": layer,
    "build": build,
    "decode": decode,
    "devices": devices,
    "host": host,
    "quality": quality,
    "report": report,
}


def make_parser() -> argparse.ArgumentParser:
    """The command line: what all commands share is said here."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        about = module.__doc__ or ""
        command = commands.add_parser(
            name, help=about.partition("\n")[0], description=about, allow_abbrev=False
        )
        module.add_arguments(command)
        command.set_defaults(parser=command, function=report.report)
        if module is report:
            continue
        command.set_defaults(function=measure, plan=module.plan)
        command.add_argument(
            "--output", type=Path, metavar="FILE", help="default: in benchmarks/local/"
        )
        command.add_argument(
            "--commit", help="for a machine without the history; may end in -dirty"
        )
        if module not in (decode, host):  # A segment has its steps, and so has a walk.
            command.add_argument("--quick", action="store_true", help="few repetitions")
    return parser


def measure(arguments: argparse.Namespace) -> int:
    """Measures what a command line asks for, writes a results file and shows it.

    Returns:
      0, or 1 if anything failed or nothing was measured, or 130 if the user interrupted it.
    """
    started, now = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    try:
        plan = arguments.plan(arguments)
        machine = results.describe_machine()
        stamp = now.strftime("%Y%m%d-%H%M%S")
        output = results.output_path(arguments.output, f"{machine['device']} {plan.name} {stamp}")
    except ValueError as error:
        arguments.parser.error(str(error))
    commit = results.find_commit(arguments.commit)
    if commit["commit"] is None:
        say("The commit is not known here: give it with --commit, or the results cannot name it.")

    def save() -> None:
        about = {
            "kind": plan.kind,
            "time": now.isoformat(timespec="seconds"),
            "command": results.repeatable(arguments.argv),
            **commit,
            "machine": machine,
            "quick": getattr(arguments, "quick", False),
            "seconds": round(time.perf_counter() - started, 1),
        }
        results.write(output, {**about, **plan.about, "rows": plan.rows()})

    interrupted = False
    try:
        for _ in plan.measure(plan):  # A run that is killed keeps what it has.
            save()
    except KeyboardInterrupt:
        interrupted = True
    save()
    (found,) = results.load([output])
    report.show([found])
    say(f"{output} ({found['seconds']:.0f} s)")
    statuses = [row.get("status", "ok") for row in found["rows"]]
    if failures := len(plan.problems) + statuses.count("failed"):
        say(f"{failures} failed")
    if interrupted:
        say("interrupted: what was measured until then is kept")
        return 130
    if "ok" not in statuses:
        say("nothing was measured; the table says why")
        return 1
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, that of the process by default; wrong usage exits with 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = make_parser().parse_args(argv)
    arguments.argv = argv
    return arguments.function(arguments)


if __name__ == "__main__":
    sys.exit(main())
