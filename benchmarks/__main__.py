"""`python -m benchmarks run` measures, `python -m benchmarks report` shows what was measured."""

import os

# Both frameworks share the GPU, and JAX reads this when it first touches it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import sys
from collections.abc import Sequence

from benchmarks import report, run


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
      argv: arguments; None for those of the process.

    Returns:
      0, or 1 if something failed or is stale; wrong usage exits with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for module, name, summary in (
        (run, "run", "check outputs, then time implementations"),
        (report, "report", "tables and pictures of results"),
    ):
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(function=getattr(module, name), parser=command)
    arguments = parser.parse_args(argv)
    arguments.argv = argv[1:]
    return arguments.function(arguments)


if __name__ == "__main__":
    sys.exit(main())
