"""Checks and times whole attention layers of a decode: write keys and values, select, attend.

Beside ours stand full attention over the same caches, the original, and attention to given lists.
Scans run through stacked layers, or through steps of one, inside one jit. Serving is several query
tokens a step, and caches in pages.
"""

import argparse
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks import frontier, jax_steps, results, torch_steps
from benchmarks.layer_steps import (
    JaxAttention,
    JaxLayer,
    Layer,
    LayerWorkload,
    Original,
    OriginalAttention,
    Sdpa,
    TorchLayer,
    attention_programs,
    full,
    layer_programs,
    ours,
)
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
from benchmarks.run import KNOWN, POOL_FLAGS, add_names, add_sizes, changed, changes_of, known
from jax_indexer.config import default_selector

# Workloads

LLAMA = {"N": 32, "K": 8, "L": 131072}  # a layer of Llama 3 8B
SCANS = {
    w.name: w
    for w in (
        LayerWorkload(name="layers-b1", layers=32, **LLAMA),
        LayerWorkload(name="layers-b2", B=2, layers=32, **LLAMA),
        LayerWorkload(name="steps-b1", steps=64, **LLAMA),
        LayerWorkload(name="steps-b4", B=4, steps=64, **LLAMA),
    )
}
LAYERS = {name: LayerWorkload(**vars(w)) for name, w in KNOWN.items()}
DEFAULT = [
    changed(LAYERS[name], changes)
    for name, changes in (
        ("llama-32k", {}),
        ("llama-128k-b4", {"B": 1}),
        ("llama-128k-b4", {}),
        ("wide", {}),
        ("million", {}),
    )
]
SWEEP, FRONTIER = "layer", frontier.SWEEP  # their names in results
SWEEP_BASE, FRONTIER_BASE = "llama-32k", "llama-128k-b4"
# What a sweep and a scan have beside ours, unless told otherwise.
BESIDE_OURS_SWEPT = ("jax:xla", "jax:full-cudnn", "torch:original", "torch:sdpa")
BESIDE_OURS_SCANNED = ("jax:full-cudnn", "jax:full-cudnn-unrolled")
SWEPT = [{"B": rows, "L": 2**exponent} for exponent in range(10, 21, 2) for rows in (1, 4)]


def pools(estimate: str | None, *ranks: int, **sizes: int) -> list[dict[str, Any]]:
    """Sizes that rerank so many budgets of candidates, and estimate the others or drop them."""
    rest = {"estimate-rest": estimate} if estimate else {}
    return [sizes | ({"rerank": rank} if rank > 1 else {}) | rest for rank in ranks]


# The frontier of quality against time: ways to end a step, with other budgets and codes for the
# best of them; those that matter most for one row; and how two of these grow with a context.
POINTS = [
    *pools(None, 1, 2, 4, 8, 16, 32),
    *pools("mean", 1, 4, 8),
    *pools("codes", 1, 2, 4, 8, 16, 32),
    *(point for budget in (64, 256, 512) for point in pools("codes", 8, heavy=budget)),
    *pools("codes", 1, 8, bits=5),
    *pools("codes", 1, 8, M=4, bits=3),
    *pools(None, 1, 4, B=1),
    *pools("mean", 1, 4, B=1),
    *pools("codes", 1, 8, 16, B=1),
    *(point for length in (2**15, 2**20) for point in pools("mean", 1, 4, B=1, L=length)),
]

# Serving: query tokens of a step, and for two of these numbers caches in pages, by their size.
SERVING = "serving"
DRAFTS = [{"T": tokens} for tokens in (1, 2, 4, 8)]
PAGED_DRAFTS, PAGE_SIZES = (1, 4), (16, 64, 256)

REPETITIONS = Repetitions(pipeline=200, warm=30, cold=60, calls=30, amortised=100, rounds=5)
SWEEP_REPETITIONS = Repetitions(pipeline=0, warm=0, cold=30, rounds=3)
QUICK = Repetitions(pipeline=10, warm=10, cold=5, calls=5, amortised=10, rounds=1)

# Names of implementations


def _refusal(
    w: LayerWorkload,
    *,
    full: bool = False,
    unrolled: bool = False,
    scans: bool = True,
    pools: bool = True,
    page_size: int | None = None,
) -> str | None:
    if w.config.window_size < w.T:
        return f"a window of {w.config.window_size} does not hold the step's {w.T} tokens"
    if page_size and (w.config.rerank > 1 or w.config.estimate_rest or w.layers):
        return "of pages lists of one layer are checked"
    if page_size and w.capacity % page_size:
        return f"S={w.capacity} is no multiple of {page_size}"
    if not pools and (w.config.rerank > 1 or w.config.estimate_rest):
        return "no rerank and no rest"
    if w.count > 1 and not scans:
        return "a scan is one jit"
    if full and unrolled != bool(w.layers):
        return "of stacked layers, and only these, it wants an array each: unrolled"
    if min(w.lengths) < w.steps:
        return f"a row of L={min(w.lengths)} has no room for {w.steps} steps"
    return "full attention is that of one query token here" if full and w.T != 1 else None


def _jax(
    name: str,
    make: Any,
    implementation: str,
    *,
    selector=None,
    unrolled=False,
    page_size=None,
    **options: Any,
) -> Implementation:
    form = {"selector": selector, "unrolled": unrolled, "page_size": page_size}
    programs = {"make": make, "implementation": implementation, **form, **options}

    def refuses(w: LayerWorkload) -> str | None:
        reason = jax_steps.refused_by_cells(w) if selector == "cells" else None
        return reason or _refusal(w, full=make is full, unrolled=unrolled, page_size=page_size)

    return Implementation(
        f"jax:{name}",
        functools.partial(JaxLayer, **form),
        functools.partial(layer_programs, **programs),
        needs_gpu=implementation != "xla",
        pipeline=implementation == "triton",
        refuses=refuses,
    )


def _torch(name: str, step: type[TorchLayer]) -> Implementation:
    def refuses(w: LayerWorkload) -> str | None:
        return torch_steps.refused(w) or _refusal(w, scans=False, pools=False)

    build = lambda layer, programs: step(layer)  # noqa: E731
    return Implementation(name, build, needs_gpu=False, refuses=refuses)


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        _jax("cells", ours, "triton", selector="cells"),
        _jax("threshold", ours, "triton", selector="threshold"),
        _jax("xla", ours, "xla"),
        *(
            _jax(f"full-{name}{'-unrolled' * unrolled}", full, name, unrolled=unrolled)
            for unrolled in (False, True)
            for name in ("cudnn", "xla")
        ),
        *(
            _jax(f"{selector}-pages-{size}", ours, "triton", selector=selector, page_size=size)
            for selector in ("cells", "threshold")
            for size in PAGE_SIZES
        ),
        _torch("torch:original", Original),
        _torch("torch:sdpa", Sdpa),
        Implementation(
            "jax.sparse_attention",
            JaxAttention,
            attention_programs,
            needs_gpu=False,
            refuses=functools.partial(_refusal, scans=False, pools=False),
        ),
        _torch("torch.sparse_attention", OriginalAttention),
    )
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `layer`."""
    add_names(parser, [w.name for w in DEFAULT], [*LAYERS, *SCANS], IMPLEMENTATIONS)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--sweep",
        action="store_true",
        help=f"{SWEEP_BASE} from 1024 to 2**20 tokens, for one row and four; kernel times only",
    )
    which.add_argument(
        "--frontier",
        action="store_true",
        help=f"{FRONTIER_BASE} with what reranks and estimates the rest; kernel times only",
    )
    which.add_argument(
        "--serving",
        action="store_true",
        help=f"{FRONTIER_BASE} with several query tokens and pages; kernel times only",
    )
    which.add_argument("--scan", action="store_true", help=f"by default {', '.join(SCANS)}")
    add_sizes(parser, POOL_FLAGS)


def swept(arguments: argparse.Namespace) -> str | None:
    """The sweep that a command line asks for, by its name in results."""
    asked = {SWEEP: arguments.sweep, FRONTIER: arguments.frontier, SERVING: arguments.serving}
    return next((name for name in asked if asked[name]), None)


def chosen_workloads(arguments: argparse.Namespace) -> list[LayerWorkload]:
    """The workloads of a command line; ValueError for names and sizes that cannot be."""
    changes, names, there = changes_of(arguments), arguments.workload, LAYERS | SCANS
    points, base = {
        None: ([{}], None),
        SWEEP: (SWEPT, SWEEP_BASE),
        FRONTIER: (POINTS, FRONTIER_BASE),
        SERVING: (DRAFTS, FRONTIER_BASE),
    }[swept(arguments)]
    if names is not None or base:
        bases = [there[name] for name in known("--workload", names or [base], there)]
    else:
        bases = list(SCANS.values()) if arguments.scan else DEFAULT
    return [changed(w, changes | point) for w in bases for point in points]


def beside_ours(w: LayerWorkload, sweep: str | None) -> Sequence[str]:
    """What is measured beside ours in a sweep or a scan."""
    if sweep == SERVING:
        selectors = ("cells", "threshold") if max(PAGED_DRAFTS) == w.T else ("cells",)
        sizes = PAGE_SIZES if w.T in PAGED_DRAFTS else ()
        paged = [f"jax:{name}-pages-{size}" for name in selectors for size in sizes]
        return [*paged, "jax:threshold"]
    if sweep != FRONTIER:
        return BESIDE_OURS_SWEPT if sweep else BESIDE_OURS_SCANNED
    whole = w.config.rerank == 1 and not w.config.estimate_rest  # full attention, once a shape
    return ("jax:full-cudnn",) if whole else ()


def chosen_rows(arguments: argparse.Namespace) -> Iterable[list[Row]]:
    """The rows of a command line, in groups that share their caches; ValueError as above."""
    names = arguments.implementation
    known_ones = known("--implementation", names or IMPLEMENTATIONS, IMPLEMENTATIONS)
    forms = [IMPLEMENTATIONS[name] for name in known_ones]
    if not names and not arguments.serving:
        forms = [form for form in forms if "-pages-" not in form.name]
    if not results.has_gpu() and not names:
        forms = [form for form in forms if not form.needs_gpu]
    sweep = swept(arguments)
    for w in chosen_workloads(arguments):
        here = [form for form in forms if names or form.refuses(w) is None]
        if (sweep or w.count > 1) and not names and results.has_gpu():  # Ours as a user gets it.
            config = dataclasses.replace(w.config.pool, cells=True)
            user = f"jax:{default_selector(config, w.capacity, w.T)}"
            here = [form for form in here if form.name in (user, *beside_ours(w, sweep))]
        for separate in (False, True):
            group = [form for form in here if form.name.endswith("-unrolled") == separate]
            if group:
                yield [Row(w, form, "layer", sweep) for form in group]


def plan(arguments: argparse.Namespace) -> Plan:
    """What a command line of `layer` asks for; ValueError if it cannot be."""
    table = list(chosen_rows(arguments))
    sweep = swept(arguments)
    repetitions = SWEEP_REPETITIONS if sweep else REPETITIONS
    if arguments.quick:
        repetitions = QUICK

    def measured(plan: Plan) -> Iterator[None]:
        clock = open_clock(plan)
        calls = not sweep or clock is None
        return measure_all(table, Settings(Layer, repetitions, clock, calls=calls))

    ways = "sweep", "frontier", "serving", "scan"
    name = "-".join(["layer", *(way for way in ways if getattr(arguments, way))])
    return plan_of("layer", f"{'quick-' * arguments.quick}{name}", table, measured)
