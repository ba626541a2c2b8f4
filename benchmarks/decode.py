"""`python -m benchmarks.decode` measures every step of a decode with "cells": what sealing costs.

A step's work depends on how far the next segment is. So the rows grow, from where nothing waits to
be sealed until a segment was: counted, moved for, sealed. The mean is over one segment's steps.
"""

import os

# Both frameworks share the GPU, and JAX reads this when it first touches it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import dataclasses
import datetime
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import clock as clocks
from benchmarks import machine
from benchmarks.clock import LEAD, ClockError, KernelClock, Stream, summary
from benchmarks.files import (
    add_output_arguments,
    chosen_output,
    exit_status,
    fill,
    repeatable_command,
)
from benchmarks.implementations import index_of, shapes_of
from benchmarks.measure import say
from benchmarks.programs import Forms, Program, compilers
from benchmarks.run import shape_of
from benchmarks.tables import decode_table, show
from jax_indexer import Selection, indexer_next, select, with_cells
from jax_indexer.state import sealing_for
from parity.inputs import WORKLOADS, Workload, make_inputs

SELECTOR = "cells"
DECODED = {
    **{name: WORKLOADS[name] for name in ("seed", "llama-32k", "llama-128k-b4", "wide", "million")},
    "llama-128k-b16": dataclasses.replace(WORKLOADS["llama-128k-b4"], B=16),
}


@dataclasses.dataclass(frozen=True)
class Decode:
    """A workload that ends where a segment was sealed.

    Attributes:
      workload: with room for the steps behind its context.
      steps: how many.
      segment: tokens of a segment.
    """

    workload: Workload
    steps: int
    segment: int

    @classmethod
    def of(cls, w: Workload) -> "Decode":
        """From the context of a workload on."""
        config = dataclasses.replace(w.config, cells=True)
        longest = max(w.lengths)
        steps = 0
        for _ in range(2):  # segments depend on the capacity, which depends on them
            sealing = sealing_for(longest + steps, config)
            steps = sealing.most_waiting(longest) + 2
        w = dataclasses.replace(w, config=config, S=longest + LEAD + steps)
        return cls(w, steps, sealing.segment)


class Decoder:
    """The state of a decode: what the clock launches."""

    def __init__(self, decode: Decode, program: Program):
        w, inputs = decode.workload, make_inputs(decode.workload)
        self._program = program
        self.query, self._key_new = jnp.asarray(inputs.query), jnp.asarray(inputs.key_new)
        self.index = with_cells(index_of(inputs), w.config)
        self.selection: Selection | None = None

    def launch(self) -> None:
        inputs = self.query, self._key_new, self.index
        self.selection, self.index = self._program.recorded(*inputs)

    def wait(self) -> None:
        jax.block_until_ready((self.selection, self.index))


def program_of(decode: Decode, forms: Forms) -> Program:
    """`indexer_next` under jit, with the index donated."""
    w, config = decode.workload, decode.workload.config

    def step(query, key_new, index):
        options = {"return_weights": w.weights, "selector": SELECTOR}
        return indexer_next(query, key_new, index, config, **options)

    query, key_new, _, index = shapes_of(w, config)
    return Program(forms, step, (query, key_new, index), donate="index")


def measure(decode: Decode, program: Program, clock: KernelClock) -> dict[str, Any]:
    """Times all steps, and checks the last one's lists against another selector's.

    Raises:
      AssertionError: if they differ, or the rows have not grown as they should.
    """
    w = decode.workload
    decoder = Decoder(decode, program)
    with clocks.no_garbage_collection():
        (kernels,) = clock.record(
            [Stream(decoder.launch, decoder.wait, "jax", decode.steps)], cold=False
        )
    calls = clocks.cut(kernels, decode.steps, cold=False)
    lengths = np.asarray(w.lengths) + LEAD + decode.steps
    np.testing.assert_array_equal(decoder.index.lengths, lengths)
    want = select(decoder.query, decoder.index, w.config)
    assert decoder.selection is not None
    np.testing.assert_array_equal(decoder.selection.indices, want.indices)
    times = [sum(kernel.duration for kernel in call) for call in calls]
    return {
        "steps": decode.steps,
        "segment": decode.segment,
        "warm": summary(times),
        "mean_of_a_segment": float(np.mean(times[-decode.segment :])),
        "launches": len(calls[0]),
        "times": [round(x, 2) for x in times],
    }


def rows_of(names: Sequence[str], clock: KernelClock) -> Iterator[list[dict[str, Any]]]:
    """The row of each workload, as a results file has it."""
    decodes = {name: Decode.of(DECODED[name]) for name in names}
    with compilers() as pool:
        forms = Forms(pool, user=False, recorded=True)
        programs = {name: program_of(decode, forms) for name, decode in decodes.items()}
    for name, decode in decodes.items():
        row: dict[str, Any] = {
            "workload": name,
            "shape": shape_of(decode.workload),
            "implementation": f"jax:{SELECTOR}",
            "framework": "jax",
            "status": "ok",
            "reason": None,
            "command": f"python -m benchmarks.decode --workload {name}",
        }
        say(name)
        try:
            row |= measure(decode, programs[name], clock)
        except Exception as error:
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
            say(f"failed: {name}: {row['reason']}\n  repeat it: {row['command']}")
        yield [row]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for and writes a results file.

    Returns:
      0, or 1 if anything failed, or 130 if the user interrupted it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=DECODED,
        default=list(DECODED),
        metavar="NAME",
        help=f"default: {', '.join(DECODED)}",
    )
    add_output_arguments(parser)
    arguments = parser.parse_args(argv)
    if not machine.has_gpu():
        parser.error('no NVIDIA GPU: "cells" needs one')
    started = time.perf_counter()
    now = datetime.datetime.now(datetime.UTC)
    default = f"decode-{now.strftime('%Y%m%d-%H%M%S')}.json"
    output = chosen_output(arguments.output, default, parser)
    try:
        clock = clocks.open_kernel_clock()
    except ClockError as error:
        say(f"failed: no kernel times, since no profiler records this process: {error}")
        return 1

    results: dict[str, Any] = {
        "kind": "decode",
        "time": now.isoformat(timespec="seconds"),
        "command": repeatable_command(argv, "benchmarks.decode"),
        **machine.find_commit(arguments.commit),
        "machine": machine.describe_machine(),
        "quick": False,
        "kernel_clock": clock.name,
    }
    rows = rows_of(list(dict.fromkeys(arguments.workload)), clock)
    interrupted = fill(output, results, rows, started)
    show(f"a decode, {results['machine']['device']}", decode_table(results["rows"]))
    say(f"{output} ({results['seconds']:.0f} s)")
    return exit_status(results, interrupted=interrupted)


if __name__ == "__main__":
    sys.exit(main())
