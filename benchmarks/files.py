"""Results files: where they go, and that they can be written before anything is measured."""

import argparse
import json
import shlex
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LOCAL = Path(__file__).parent / "local"  # not committed


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """What every program that measures takes."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/local/")
    parser.add_argument("--commit", help="for a machine without the history; may end in -dirty")


def chosen_output(chosen: Path | None, default: str, parser: argparse.ArgumentParser) -> Path:
    """Where results go, made ready; a file that cannot be written is wrong usage.

    Args:
      chosen: `--output`, or None.
      default: name of a file in benchmarks/local/.
      parser: ends the program with its message and status 2.

    Returns:
      A path in a folder that exists.
    """
    path = LOCAL / default if chosen is None else chosen
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        parser.error(f"--output: expected a file that can be written, got {path}: {error}")
    return path


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes a results file."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def fill(
    path: Path,
    results: dict[str, Any],
    parts: Iterable[list[dict[str, Any]]],
    started: float,
) -> bool:
    """Adds rows to a results file as they come, so that what ends it early loses none.

    Args:
      path: of the file.
      results: what is known before the first row; gets `rows`, and `seconds` until the last.
      parts: makes some rows at a time.
      started: by `time.perf_counter`, when the program began.

    Returns:
      Whether the user interrupted it.
    """
    interrupted = False
    results |= {"seconds": 0.0, "rows": []}
    try:
        for rows in parts:
            results["rows"] += rows
            results["seconds"] = round(time.perf_counter() - started, 1)
            write(path, results)
    except KeyboardInterrupt:
        interrupted = True
    write(path, results)
    return interrupted


def exit_status(results: dict[str, Any], *, interrupted: bool, failures: int = 0) -> int:
    """0, or 1 if anything failed, or 130 if the user interrupted it, which is said."""
    if interrupted:
        print("interrupted: what was measured until then is kept", flush=True)
        return 130
    failures += sum(row["status"] == "failed" for row in results["rows"])
    return 1 if failures else 0


def repeatable_command(argv: Sequence[str], module: str) -> str:
    """The command line, less what is no part of the measurement: where results went, the commit."""
    kept, words = [], iter(argv)
    for word in words:
        if word in ("--output", "--commit"):
            next(words)
        elif not word.startswith(("--output=", "--commit=")):
            kept.append(word)
    return shlex.join(["python", "-m", *module.split(), *kept])
