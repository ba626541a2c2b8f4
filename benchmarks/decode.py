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
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import clock as clocks
from benchmarks import machine
from benchmarks.clock import LEAD, ClockError, KernelClock, Stream, summary
from benchmarks.files import add_output_arguments, chosen_output, repeatable_command, write
from benchmarks.measure import say
from benchmarks.programs import Forms, Program, compilers
from benchmarks.run import shape_of
from benchmarks.tables import decode_table, show
from benchmarks.workloads import WORKLOADS, Workload, make_inputs
from jax_indexer import PQIndex, Selection, indexer_next, select, with_cells
from jax_indexer.cells import seal_plan

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
        for _ in range(2):  # the plan depends on the capacity, which depends on the plan
            plan = seal_plan(longest + steps, config)
            steps = plan.segment + -(-longest // plan.block) + 2
        w = dataclasses.replace(w, config=config, S=longest + LEAD + steps)
        return cls(w, steps, plan.segment)


class Decoder:
    """The state of a decode: what the clock launches."""

    def __init__(self, decode: Decode, program: Program):
        w, inputs = decode.workload, make_inputs(decode.workload)
        self._program = program
        self._inputs = jnp.asarray(inputs.query), jnp.asarray(inputs.key_new)
        index = PQIndex(
            codebooks=jnp.array(inputs.codebooks),
            codes=jnp.array(inputs.codes),
            lengths=jnp.array(inputs.lengths),
            phi=None if inputs.phi is None else jnp.array(inputs.phi),
        )
        self.index = with_cells(index, w.config)
        self.selection: Selection | None = None

    def launch(self) -> None:
        self.selection, self.index = self._program.recorded(*self._inputs, self.index)

    def wait(self) -> None:
        jax.block_until_ready((self.selection, self.index))


def program_of(decode: Decode, forms: Forms) -> Program:
    """`indexer_next` under jit, with the index donated."""
    w, config = decode.workload, decode.workload.config
    dtype, heads = jnp.dtype(w.dtype), (w.B, w.K, config.num_subspaces)

    def step(query, key_new, index):
        options = {"return_weights": w.weights, "selector": SELECTOR}
        return indexer_next(query, key_new, index, config, **options)

    index = PQIndex(
        codebooks=jax.ShapeDtypeStruct((*heads, config.num_centroids, w.H // heads[2]), dtype),
        codes=jax.ShapeDtypeStruct((*heads, w.capacity), np.uint8),
        lengths=jax.ShapeDtypeStruct((w.B,), np.int32),
    )
    index = jax.eval_shape(lambda index: with_cells(index, config), index)
    query = jax.ShapeDtypeStruct((w.B, 1, w.N, w.H), dtype)
    key_new = jax.ShapeDtypeStruct((w.B, 1, w.K, w.H), dtype)
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
    query = jnp.asarray(make_inputs(w).query)
    want = select(query, decoder.index, w.config)
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
        "seconds": 0.0,
        "rows": [],
    }
    interrupted, names = False, list(dict.fromkeys(arguments.workload))
    try:
        with compilers() as pool:
            forms = Forms(pool, user=False, recorded=True)
            decodes = {name: Decode.of(DECODED[name]) for name in names}
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
            results["rows"].append(row)
            results["seconds"] = round(time.perf_counter() - started, 1)
            write(output, results)
    except KeyboardInterrupt:
        interrupted = True
    write(output, results)
    show(f"a decode, {results['machine']['device']}", decode_table(results["rows"]))
    say(f"{output} ({results['seconds']:.0f} s)")
    if interrupted:
        say("interrupted: what was measured until then is kept")
        return 130
    return 1 if any(row["status"] == "failed" for row in results["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
