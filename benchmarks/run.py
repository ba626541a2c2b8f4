"""Checks the outputs of a decode step, then times all implementations in turns."""

import argparse
import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks import jax_steps, results, torch_steps
from benchmarks.ceilings import Ceilings, measure_ceilings, top_k_work
from benchmarks.clock import KernelClock
from benchmarks.jax_steps import JaxStep, JaxTopK
from benchmarks.measure import (
    Implementation,
    Repetitions,
    Row,
    Settings,
    measure_all,
    open_clock,
    plan_of,
)
from benchmarks.results import Plan
from benchmarks.torch_steps import TorchGraphStep, TorchStep, TorchTopK
from parity.agreement import Reference
from parity.inputs import SCORES, SMALL, WORKLOADS, Workload, make_inputs

# Names of implementations


def _jax(name: str, implementation: str, selector: str | None) -> Implementation:
    programs = functools.partial(
        jax_steps.step_programs, implementation=implementation, selector=selector
    )
    return Implementation(
        f"jax:{name}",
        functools.partial(JaxStep, selector=selector),
        programs,
        needs_gpu=implementation == "triton",
        pipeline=implementation == "triton",
        refuses=jax_steps.refused_by_cells if selector == "cells" else lambda w: None,
    )


def _torch(name: str, *, graph: bool = False, needs_gpu: bool = True) -> Implementation:
    form = TorchGraphStep if graph else TorchStep
    return Implementation(
        f"torch:{name}{'-graph' * graph}",
        lambda reference, programs: form(reference, name=name),
        needs_gpu=needs_gpu,
        refuses=torch_steps.refused,
    )


def _top_k(name: str, build: Callable[..., Any], programs: Any = None) -> Implementation:
    return Implementation(name, build, programs, top_k_work, needs_gpu=False)


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        _jax("cells", "triton", "cells"),
        _jax("threshold", "triton", "threshold"),
        _jax("top_k", "triton", "top_k"),
        _jax("xla", "xla", None),
        _torch("eager", needs_gpu=False),
        _torch("eager", graph=True),
        _torch("iteration1"),
        _torch("iteration2"),
        _torch("iteration3"),
        _torch("iteration4"),
        _torch("iteration4", graph=True),
        _top_k("jax.lax.top_k", JaxTopK, jax_steps.top_k_programs),
        _top_k("torch.topk", lambda reference, programs: TorchTopK(reference)),
    )
}

# Workloads, and what changes them

KNOWN = WORKLOADS | SMALL
FLOATS = ("float32", "bfloat16", "float16")

# Flags that change a workload: field, type or choices, what it is.
WORKLOAD_FLAGS = {
    "B": ("B", int, "batch rows"),
    "T": ("T", int, "query tokens of a step"),
    "N": ("N", int, "query heads"),
    "K": ("K", int, "key/value heads"),
    "H": ("H", int, "head dimension"),
    "S": ("S", int, "capacity in tokens"),
    "L": ("L", int, "tokens in the cache, the step's own included: one number or one a row"),
    "dtype": ("dtype", FLOATS, "of queries, keys and codebooks"),
    "scores": ("scores", SCORES, "how the scores of the tokens lie"),
}
CONFIG_FLAGS = {
    "M": ("num_subspaces", int, "PQ subspaces"),
    "bits": ("num_bits", int, "bits of a code"),
    "heavy": ("heavy_size", int, "budget of tokens chosen by score"),
    "sink": ("sink_size", int, "first tokens, always attended"),
    "window": ("window_size", int, "last tokens, always attended"),
    "table-dtype": ("table_dtype", FLOATS, "what look-up table entries are rounded to"),
}
# Of whole layers alone.
POOL_FLAGS = {
    "rerank": ("rerank", int, "candidates that are ranked by their keys, in budgets"),
    "estimate-rest": ("estimate_rest", ("mean", "codes"), "how the other candidates are estimated"),
}
FLAGS_OF_CONFIGS = CONFIG_FLAGS | POOL_FLAGS

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
SWEEP_IMPLEMENTATIONS = (
    "jax:cells",
    "jax:threshold",
    "jax:top_k",
    "torch:eager",
    "torch:iteration4",
    "jax.lax.top_k",
)
SWEEP_REPETITIONS = Repetitions(pipeline=100, warm=20, cold=0, rounds=2)
QUICK = Repetitions(pipeline=20, warm=10, cold=5, calls=8, amortised=20, rounds=2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `run`."""
    add_names(parser, WORKLOADS, SMALL, IMPLEMENTATIONS)
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="all",
        choices=["all", *SWEEPS],
        help=f"vary a size, or each in turn, of {SWEEP_BASE} by default; kernel times only",
    )
    add_sizes(parser)


def add_names(
    parser: argparse.ArgumentParser,
    default: Iterable[str],
    others: Iterable[str],
    implementations: Iterable[str],
) -> None:
    """The flags that name workloads and implementations."""
    parser.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        help=f"default: {', '.join(default)}; also {', '.join(others)}",
    )
    parser.add_argument(
        "--implementation",
        nargs="+",
        metavar="NAME",
        help=f"default: all that run here of {', '.join(implementations)}",
    )


def add_sizes(parser: argparse.ArgumentParser, more: dict[str, Any] | None = None) -> None:
    """The flags that change workloads, and some more of configs."""
    sizes = parser.add_argument_group("change the workloads")
    for flag, (_, kind, meaning) in (WORKLOAD_FLAGS | CONFIG_FLAGS | (more or {})).items():
        values: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if flag == "L":
            values["nargs"] = "+"
        sizes.add_argument(f"--{flag}", help=meaning, **values)
    sizes.add_argument(
        "--weights", action=argparse.BooleanOptionalAction, help="write the dense weight rows"
    )


class Point(NamedTuple):
    """A workload, and the sweep that it is a point of, if any."""

    workload: Workload
    sweep: str | None = None


def chosen_points(arguments: argparse.Namespace) -> list[Point]:
    """The workloads of a command line.

    Raises:
      ValueError: for unknown names, and for sizes that contradict each other.
    """
    default = [SWEEP_BASE] if arguments.sweep else WORKLOADS
    names = known("--workload", arguments.workload or default, KNOWN)
    changes = changes_of(arguments)
    if not arguments.sweep:
        return [Point(changed(KNOWN[name], changes)) for name in names]
    sweeps = list(SWEEPS) if arguments.sweep == "all" else [arguments.sweep]
    for sweep in sweeps:
        if twice := [flag for flag in changes if flag in SWEEPS[sweep][0]]:
            raise ValueError(
                f"--{twice[0]}: expected nothing, since the sweep of {sweep} sets it, "
                f"got {changes[twice[0]]}; leave it out, or choose another --sweep"
            )
    return [
        Point(changed(KNOWN[name], changes | point), sweep)
        for name in names
        for sweep in sweeps
        for point in SWEEPS[sweep]
    ]


def changes_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a command line says of sizes, by flag."""
    return {
        flag: value
        for flag in (*WORKLOAD_FLAGS, *FLAGS_OF_CONFIGS, "weights")
        if (value := getattr(arguments, flag.replace("-", "_"), None)) is not None
    }


def known(flag: str, names: Any, table: dict[str, Any]) -> list[str]:
    """Names that were given, each once; ValueError if one is not known."""
    if unknown := [name for name in names if name not in table]:
        raise ValueError(f"{flag}: expected names of {', '.join(table)}, got {', '.join(unknown)}")
    return list(dict.fromkeys(names))


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
            config[FLAGS_OF_CONFIGS[flag][0]] = value
    if not changes:
        return workload
    new = dataclasses.replace(
        workload,
        name=" ".join(words),
        config=dataclasses.replace(workload.config, **config),
        **fields,
    )
    if min(new.lengths) < 0 or max(new.lengths) > new.capacity:
        raise ValueError(f"L: expected numbers in 0..S={new.capacity}, got {new.L}; change L or S")
    if max(new.lengths) < new.T:
        raise ValueError(
            f"L: expected at least the step's own {new.T}, got {max(new.lengths)}; make it larger"
        )
    return new


def chosen_implementations(arguments: argparse.Namespace) -> list[Implementation]:
    """The implementations of a command line.

    Raises:
      ValueError: for unknown names.
    """
    if arguments.implementation:
        names = known("--implementation", arguments.implementation, IMPLEMENTATIONS)
        return [IMPLEMENTATIONS[name] for name in names]
    gpu = results.has_gpu()
    names = SWEEP_IMPLEMENTATIONS if arguments.sweep and gpu else IMPLEMENTATIONS
    chosen = [IMPLEMENTATIONS[name] for name in names]
    if not gpu:
        chosen = [x for x in chosen if results.is_indexer(x.name) and not x.needs_gpu]
    return [x for x in chosen if x.framework == "jax" or results.version("torch")]


# The run


def plan(arguments: argparse.Namespace) -> Plan:
    """What a command line of `run` asks for; ValueError if it cannot be."""
    implementations = chosen_implementations(arguments)
    kind = "sweep" if arguments.sweep else "named"
    table = [
        [Row(point.workload, one, kind, point.sweep) for one in implementations]
        for point in chosen_points(arguments)
    ]
    repetitions = SWEEP_REPETITIONS if arguments.sweep else Repetitions()
    if arguments.quick:
        repetitions = QUICK

    def measured(plan: Plan) -> Iterator[None]:
        clock = open_clock(plan)
        settings = Settings(
            lambda w: Reference(w, make_inputs(w)),
            repetitions,
            clock,
            clock and _ceilings(plan, clock),
            # A sweep is about kernels, where they can be timed.
            chains=not arguments.sweep,
            calls=not arguments.sweep or clock is None,
        )
        return measure_all(table, settings)

    name = f"sweep-{arguments.sweep}" if arguments.sweep else "-".join(arguments.workload or ())
    return plan_of(kind, f"{'quick-' * arguments.quick}{name or kind}", table, measured)


def _ceilings(plan: Plan, clock: KernelClock) -> Ceilings | None:
    """The ceilings, noted in the plan; None if they cannot be measured."""
    try:
        ceilings = measure_ceilings(clock)
    except Exception as error:
        traceback.print_exc()
        plan.failed(f"ceilings: {type(error).__name__}: {error}")
        return None
    plan.about["ceilings"] = ceilings._asdict()
    return ceilings
