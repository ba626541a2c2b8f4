"""What a command line of `run` chooses: workloads, implementations, repetitions."""

import argparse
import dataclasses
from typing import Any

from benchmarks import machine
from benchmarks.clock import RECORDERS
from benchmarks.files import add_output_arguments
from benchmarks.implementations import IMPLEMENTATIONS, Implementation
from benchmarks.measure import QUICK, Repetitions
from parity.inputs import SCORES, SMALL, WORKLOADS, Workload

KNOWN = WORKLOADS | SMALL

FLOATS = ("float32", "bfloat16", "float16")

# Flags that change a workload: field, type or choices, what it is.
WORKLOAD_FLAGS = {
    "B": ("B", int, "batch rows"),
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
SWEEP_REPETITIONS = Repetitions(pipeline=100, warm=20, cold=0, rounds=2)
SWEEP_IMPLEMENTATIONS = (
    "jax:cells",
    "jax:threshold",
    "jax:top_k",
    "torch:eager",
    "torch:iteration4",
    "jax.lax.top_k",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `run`."""
    parser.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        help=f"default: all of {', '.join(WORKLOADS)}; also {', '.join(SMALL)}",
    )
    parser.add_argument(
        "--implementation",
        nargs="+",
        metavar="NAME",
        help=f"default: all that run here of {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="all",
        choices=["all", *SWEEPS],
        help=f"vary a size, or each in turn, of {SWEEP_BASE} by default; kernel times only",
    )
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument(
        "--clock",
        choices=["auto", *RECORDERS],
        default="auto",
        help="profiler that records kernels",
    )
    add_output_arguments(parser)
    sizes = parser.add_argument_group("change the workloads")
    for flag, (_, kind, meaning) in (WORKLOAD_FLAGS | CONFIG_FLAGS).items():
        values: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if flag == "L":
            values["nargs"] = "+"
        sizes.add_argument(f"--{flag}", help=meaning, **values)
    sizes.add_argument(
        "--weights", action=argparse.BooleanOptionalAction, help="write the dense weight rows"
    )


@dataclasses.dataclass(frozen=True)
class Point:
    """A workload, and the sweep that it is a point of, if any."""

    workload: Workload
    sweep: str | None = None


def chosen_points(arguments: argparse.Namespace) -> list[Point]:
    """The workloads of a command line.

    Raises:
      ValueError: for unknown names, and for sizes that contradict each other.
    """
    names = list(dict.fromkeys(arguments.workload or ())) or (
        [SWEEP_BASE] if arguments.sweep else list(WORKLOADS)
    )
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(
            f"--workload: expected names of {', '.join(KNOWN)}, got {', '.join(unknown)}"
        )
    changes = {
        flag: value
        for flag in (*WORKLOAD_FLAGS, *CONFIG_FLAGS, "weights")
        if (value := getattr(arguments, flag.replace("-", "_"))) is not None
    }
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
            config[CONFIG_FLAGS[flag][0]] = value
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


def chosen_implementations(arguments: argparse.Namespace, gpu: bool) -> list[Implementation]:
    """The implementations of a command line.

    Raises:
      ValueError: for unknown names.
    """
    if arguments.implementation:
        unknown = [name for name in arguments.implementation if name not in IMPLEMENTATIONS]
        if unknown:
            raise ValueError(
                f"--implementation: expected names of {', '.join(IMPLEMENTATIONS)}, "
                f"got {', '.join(unknown)}"
            )
        return [IMPLEMENTATIONS[name] for name in dict.fromkeys(arguments.implementation)]
    chosen = [x for x in IMPLEMENTATIONS.values() if gpu or not (x.needs_gpu or x.peer)]
    if arguments.sweep and gpu:
        chosen = [IMPLEMENTATIONS[name] for name in SWEEP_IMPLEMENTATIONS]
    return [x for x in chosen if x.framework == "jax" or machine.version("torch")]


def chosen_repetitions(arguments: argparse.Namespace) -> Repetitions:
    """How often a command line wants things timed."""
    if arguments.quick:
        return QUICK
    return SWEEP_REPETITIONS if arguments.sweep else Repetitions()


def timing_flags(arguments: argparse.Namespace) -> str:
    """The flags of a command line that change how things are timed, for repeating a row."""
    flags = " --quick" if arguments.quick else ""
    return flags if arguments.clock == "auto" else f"{flags} --clock {arguments.clock}"
