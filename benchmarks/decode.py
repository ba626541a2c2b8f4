"""Times every step of a decode with "cells": what sealing costs.

A step's work depends on how far the next segment is. So the rows grow, from where nothing waits to
be sealed until a segment was: counted, moved for, sealed. The mean is over one segment's steps.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import clock as clocks
from benchmarks import jax_steps, results
from benchmarks.clock import LEAD, KernelClock, Step, Stream, summary
from benchmarks.jax_steps import Forms, Program
from benchmarks.measure import Row, check, open_clock, plan_of
from benchmarks.results import Plan
from benchmarks.run import IMPLEMENTATIONS
from jax_indexer import indexer_next, select, with_cells
from jax_indexer.state import sealing_for
from parity.inputs import WORKLOADS, Workload, make_inputs
from parity.progress import progress

SELECTOR, CHECKED_BY = "cells", "threshold"
DECODED = {
    **{name: WORKLOADS[name] for name in ("seed", "llama-32k", "llama-128k-b4", "wide", "million")},
    "llama-128k-b16": dataclasses.replace(WORKLOADS["llama-128k-b4"], B=16),
}


@dataclasses.dataclass(frozen=True)
class Decode:
    """A workload that ends where a segment was sealed."""

    workload: Workload  # with room for the steps behind its context
    steps: int
    segment: int  # tokens

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

    def program(self, forms: Forms) -> Program:
        """`indexer_next` under jit, with the index donated."""
        w, config = self.workload, self.workload.config

        def step(query, key_new, index):
            options = {"return_weights": w.weights, "selector": SELECTOR}
            return indexer_next(query, key_new, index, config, **options)

        query, key_new, _, index = jax_steps.shapes_of(w, config)
        return Program(forms, step, (query, key_new, index), donate="index")


class Decoder(Step):
    """The state of a decode."""

    def __init__(self, decode: Decode, program: Program):
        w, inputs = decode.workload, make_inputs(decode.workload)
        self._program = program
        self.query, self._key_new = jnp.asarray(inputs.query), jnp.asarray(inputs.key_new)
        self.index = with_cells(jax_steps.index_of(inputs), w.config)

    def call_recorded(self):
        inputs = self.query, self._key_new, self.index
        self.selection, self.index = self._program.recorded(*inputs)

    def wait(self):
        jax.block_until_ready((self.selection, self.index))

    def check(self, reference: Decode):
        """Raises AssertionError unless rows grew, and the last lists are another selector's."""
        w = reference.workload
        lengths = np.asarray(w.lengths) + LEAD + reference.steps
        np.testing.assert_array_equal(self.index.lengths, lengths)
        want = select(self.query, self.index, w.config, selector=CHECKED_BY)
        np.testing.assert_array_equal(self.selection.indices, want.indices)


def measure(decode: Decode, program: Program, clock: KernelClock) -> dict[str, Any]:
    """Times all steps, then checks where they led."""
    decoder = Decoder(decode, program)
    stream = Stream(decoder.call_recorded, decoder.wait, "jax", decode.steps)
    with clocks.no_garbage_collection():
        (kernels,) = clock.record([stream], cold=False)
    calls = clocks.cut(kernels, decode.steps, cold=False)
    check(decoder, decode)
    times = [sum(kernel.duration for kernel in call) for call in calls]
    return {
        "steps": decode.steps,
        "segment": decode.segment,
        "warm": summary(times),
        "mean_of_a_segment": float(np.mean(times[-decode.segment :])),
        "launches": len(calls[0]),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `decode`."""
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=DECODED,
        default=list(DECODED),
        metavar="NAME",
        help=f"default: {', '.join(DECODED)}",
    )


def plan(arguments: argparse.Namespace) -> Plan:
    """What a command line of `decode` asks for; ValueError if it cannot be."""
    if not results.has_gpu():
        raise ValueError('no NVIDIA GPU: "cells" needs one')
    names = dict.fromkeys(arguments.workload)
    decodes = [Decode.of(dataclasses.replace(DECODED[name], name=name)) for name in names]
    table = [[Row(x.workload, IMPLEMENTATIONS["jax:cells"], "decode")] for x in decodes]

    def measured(plan: Plan) -> Iterator[None]:
        clock = open_clock(plan)
        if clock is None:
            for (row,) in table:
                row.give_up("skipped", "no kernel times")
            return
        with progress(len(decodes)) as advance, jax_steps.compilers() as pool:
            forms = Forms(pool, user=False, recorded=True)
            programs = [decode.program(forms) for decode in decodes]
            for decode, program, (row,) in zip(decodes, programs, table, strict=True):
                advance(row.workload.name)
                with row.attempt("decoding"):
                    row.numbers = measure(decode, program, clock)
                row.done = True
                yield

    return plan_of("decode", "decode", table, measured)
