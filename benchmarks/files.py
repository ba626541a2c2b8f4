"""Results files: where they go, and that they can be written before anything is measured."""

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
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


def repeatable_command(argv: Sequence[str], module: str) -> str:
    """The command line, less what is no part of the measurement: where results went, the commit."""
    kept, words = [], iter(argv)
    for word in words:
        if word in ("--output", "--commit"):
            next(words)
        elif not word.startswith(("--output=", "--commit=")):
            kept.append(word)
    return shlex.join(["python", "-m", *module.split(), *kept])
