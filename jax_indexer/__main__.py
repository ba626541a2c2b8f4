"""The demo: decodes 128 tokens of a real model over 8192 real keys, and says what was lost.

`python -m jax_indexer --help` lists its options.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jax_indexer import IndexerConfig, PQIndex, build_index, indexer_next, select, sparse_attention
from jax_indexer.config import Implementation
from jax_indexer.data import Sample, load_sample

BUDGETS = (32, 64, 128, 256, 512, 1024)
# 64 + 64 tokens suit a context of 8192; the defaults of 128 + 128 are for longer ones.
SINK_SIZE = WINDOW_SIZE = 64
STEPS, QUICK_STEPS = 128, 16


class Exact:
    """Full attention of the decoded positions, and exact top-k in its place; float64 throughout.

    Rows are (step, query head); step t, of T, sees the first S - T + 1 + t tokens.

    Attributes:
      weights: float64[T, N, S], the softmax over all visible tokens, else 0.
      output: float64[T, N, H], full attention.
      always: bool[T, N, S], the visible sink and window tokens.
      rank: int[T, N, S], a candidate's place by exact score, ties by position; S for other tokens.
    """

    weights: Float[np.ndarray, "T N S"]
    output: Float[np.ndarray, "T N H"]
    always: Bool[np.ndarray, "T N S"]
    rank: Int[np.ndarray, "T N S"]

    def __init__(self, sample: Sample, steps: int):
        query, key = sample.query[-steps:].astype(np.float64), sample.key[:, 0].astype(np.float64)
        self._value = sample.value[:, 0].astype(np.float64)
        capacity, size = key.shape
        scores = query @ key.T
        position = np.arange(capacity)
        visible = (capacity - steps + 1 + np.arange(steps))[:, None, None]
        seen = np.broadcast_to(position < visible, scores.shape)
        self.always = seen & ((position < SINK_SIZE) | (position >= visible - WINDOW_SIZE))
        logits = np.where(seen, scores * size**-0.5, -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        self.weights = weights / weights.sum(axis=-1, keepdims=True)
        self.output = self.weights @ self._value
        candidate = seen & ~self.always
        order = np.argsort(np.where(candidate, -scores, np.inf), axis=-1, kind="stable")
        self.rank = np.empty_like(order)
        np.put_along_axis(self.rank, order, np.broadcast_to(position, order.shape), axis=-1)
        self.rank[~candidate] = capacity

    def top(self, budget: int) -> Bool[np.ndarray, "T N S"]:
        """What exact top-k attends to with this budget: sink, window and the best candidates."""
        return self.always | (self.rank < budget)

    def mass(self, attended: Bool[np.ndarray, "T N S"]) -> float:
        """The share of the attention weights on these tokens, mean over rows."""
        return float(np.where(attended, self.weights, 0).sum(axis=-1).mean())

    def attend(self, attended: Bool[np.ndarray, "T N S"]) -> Float[np.ndarray, "T N H"]:
        """Attention over these tokens alone."""
        kept = np.where(attended, self.weights, 0)
        return kept @ self._value / kept.sum(axis=-1, keepdims=True)


def relative_error(output: Float[np.ndarray, "T N H"], truth: Float[np.ndarray, "T N H"]) -> float:
    """|output - truth| / |truth| in the Euclidean norm of a row, mean over rows."""
    distance = np.linalg.norm(output - truth, axis=-1)
    return float(np.mean(distance / np.linalg.norm(truth, axis=-1)))


@dataclasses.dataclass(frozen=True)
class Result:
    """What one budget gives; all but the time are means over steps and query heads."""

    budget: int
    recall: float  # of the tokens that exact top-k takes
    mass: float  # of attention, sink and window included
    exact_mass: float
    error: float  # of the output, against full attention
    exact_error: float
    error_to_exact: float  # of the output, against exact top-k's
    seconds: float  # median of append + select


@dataclasses.dataclass(frozen=True)
class Demo:
    """A built index and the sample it serves, ready to decode the last `steps` positions."""

    sample: Sample
    steps: int
    config: IndexerConfig
    index: PQIndex
    build_seconds: float
    implementation: Implementation
    exact: Exact

    def decode(self, budget: int, on_step: Callable[[], None] = lambda: None) -> Result:
        """Decodes step by step with one budget, and compares with exact attention."""
        config = dataclasses.replace(self.config, heavy_size=budget)
        step = jax.jit(
            functools.partial(indexer_next, config=config, implementation=self.implementation),
            donate_argnames="index",
        )
        # Float16 arithmetic would hide the differences to be shown.
        queries = jnp.asarray(self.sample.query[-self.steps :], jnp.float32)[:, None, None]
        keys = jnp.asarray(self.sample.key)[None]
        values = jnp.asarray(self.sample.value)[None]
        keys_new = keys[0, -self.steps :, None, None]
        attend = jax.jit(sparse_attention)

        def fresh_index() -> PQIndex:
            return jax.tree.map(jnp.copy, self.index)  # since each step donates its own

        jax.block_until_ready(step(queries[0], keys_new[0], index=fresh_index()))
        index = jax.block_until_ready(fresh_index())
        attended = np.zeros(self.exact.weights.shape, bool)
        outputs, seconds = np.empty(self.exact.output.shape), []
        for t in range(self.steps):
            query, key_new = jax.block_until_ready((queries[t], keys_new[t]))
            start = time.perf_counter()
            selection, index = jax.block_until_ready(step(query, key_new, index=index))
            seconds.append(time.perf_counter() - start)
            outputs[t] = attend(query, keys, values, selection)[0, 0]
            for head, listed in enumerate(np.asarray(selection.indices[0, 0])):
                attended[t, head, listed[listed >= 0]] = True
            on_step()
        exact = self.exact
        top = exact.top(budget)
        top_output = exact.attend(top)
        taken = (attended & top & ~exact.always).sum(axis=-1) / budget
        return Result(
            budget=budget,
            recall=float(taken.mean()),
            mass=exact.mass(attended),
            exact_mass=exact.mass(top),
            error=relative_error(outputs, exact.output),
            exact_error=relative_error(top_output, exact.output),
            error_to_exact=relative_error(outputs, top_output),
            seconds=float(np.median(seconds)),
        )


def prepare(num_subspaces: int, num_bits: int, steps: int) -> Demo:
    """Builds the index on all but the last `steps` tokens of the sample."""
    sample = load_sample()
    config = IndexerConfig(
        num_subspaces=num_subspaces,
        num_bits=num_bits,
        sink_size=SINK_SIZE,
        window_size=WINDOW_SIZE,
    )
    key = jnp.asarray(sample.key)[None]
    start = time.perf_counter()
    lengths = jnp.array([key.shape[1] - steps], jnp.int32)
    index = jax.block_until_ready(build_index(key, lengths, config))
    build_seconds = time.perf_counter() - start
    query = jnp.asarray(sample.query[None, :1], jnp.float32)
    return Demo(
        sample=sample,
        steps=steps,
        config=config,
        index=index,
        build_seconds=build_seconds,
        implementation=_implementation(query, index, config),
        exact=Exact(sample, steps),
    )


def _implementation(query: jax.Array, index: PQIndex, config: IndexerConfig) -> Implementation:
    """The name of what `implementation=None` picks here."""
    if jax.default_backend() == "gpu":
        try:
            jax.eval_shape(lambda q, i: select(q, i, config, implementation="triton"), query, index)
        except NotImplementedError:
            return "xla"
        return "triton"
    return "xla"


# --- what is shown --------------------------------------------------------------------------------


def _kilobytes(count: int) -> str:
    return f"{count / 1000:,.1f} kB"


def facts(demo: Demo) -> list[tuple[str, str]]:
    """What a reader of the table must know, as (name, text)."""
    config, index, sample = demo.config, demo.index, demo.sample
    capacity, _, size = sample.key.shape
    index_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(index))
    key_bytes = sample.key.nbytes
    return [
        (
            "Runs on",
            f'{jax.devices()[0].device_kind}, implementation "{demo.implementation}", '
            f"JAX {jax.__version__}",
        ),
        (
            "Keys",
            f"SmolLM2-135M-Instruct reading {capacity} tokens of Python's documentation: layer 15, "
            f"one kv head (H={size}) and the {sample.query.shape[1]} query heads that share it",
        ),
        (
            "Index",
            f"{config.num_subspaces} subspaces x {config.num_bits} bits, built on the first "
            f"{capacity - demo.steps} tokens in {demo.build_seconds:.1f} s, compilation included; "
            f"then {demo.steps} decode steps append one token each",
        ),
        (
            "Memory",
            f"{_kilobytes(index_bytes)} for the index (codes {_kilobytes(index.codes.nbytes)}, "
            f"codebooks {_kilobytes(index.codebooks.nbytes)}), {_kilobytes(key_bytes)} for the "
            f"keys in float16: {index_bytes / key_bytes:.1%}",
        ),
        (
            "Always",
            f"{SINK_SIZE} sink and {WINDOW_SIZE} window tokens, enough at this length (the "
            "defaults of 128 are for longer contexts); the budget comes on top",
        ),
    ]


def show(console: Any, demo: Demo, results: Sequence[Result]) -> None:
    """Prints the table of results; `console` is a rich Console."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for header in (
        "Budget",
        "Recall",
        "Mass kept\nPQ",
        "\nexact",
        "Output error\nPQ",
        "\nexact",
        "PQ to\nexact",
        "Step\nms",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            f"[bold]{result.budget}[/]",
            f"{result.recall:.3f}",
            f"[bold]{result.mass:.4f}[/]",
            f"{result.exact_mass:.4f}",
            f"[bold]{result.error:.4f}[/]",
            f"{result.exact_error:.4f}",
            f"{result.error_to_exact:.4f}",
            f"{result.seconds * 1e3:.3f}",
        )
    console.print(table)
    rows = demo.steps * demo.sample.query.shape[1]
    console.print(
        f"[dim]Means over {rows} rows ({demo.steps} steps, {demo.sample.query.shape[1]} heads). "
        "Recall: share of the exact top tokens that PQ finds. Mass: share of full attention's "
        "weights on the attended tokens. Output error: |o - full| / |full|; the third is that of "
        "PQ's output against exact top-k's. Step: append and select, median of synchronised "
        "calls.[/]"
    )


def advise(console: Any, demo: Demo, results: Sequence[Result]) -> None:
    """Prints what the figures mean for another model, and what to do next."""
    best = min(results, key=lambda result: result.error)
    config = demo.config
    console.print(
        f"\n[bold]For your own model.[/] At a budget of {best.budget} a head's output moves by "
        f"{best.error:.1%} of its length on average, by {best.exact_error:.1%} with exact top-k. "
        "Where the two are far apart, finer codes bring them together: "
        "--num-subspaces 8 --num-bits 8. Where exact top-k is off too, take a larger budget. "
        "Heads that look for one token suffer first, so judge by your model's own loss."
    )
    console.print(
        f"[bold]Next.[/] IndexerConfig(num_subspaces={config.num_subspaces}, "
        f"num_bits={config.num_bits}, heavy_size={best.budget}), then build_index on your keys and "
        "indexer_next in your decode step: README.md, Use."
    )


def draw(path: Path, demo: Demo, results: Sequence[Result]) -> None:
    """Draws attention mass and output error against the budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    results = sorted(results, key=lambda result: result.budget)
    budgets = [result.budget for result in results]
    exact = demo.exact
    capacity, _, size = demo.sample.key.shape
    blue, grey, ink, faint = "#0b62c4", "#767c86", "#24292f", "#c4c9d0"
    style: dict[Any, Any] = {
        "font.size": 10.5,
        "text.color": ink,
        "axes.edgecolor": faint,
        "axes.labelcolor": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e9ecf0",
        "xtick.color": faint,
        "ytick.color": faint,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "savefig.facecolor": "white",
    }
    panels = (
        (
            "Attention mass kept",
            [result.mass for result in results],
            [result.exact_mass for result in results],
            exact.mass(exact.always),
        ),
        (
            "Error of the attention output, relative",
            [result.error for result in results],
            [result.exact_error for result in results],
            relative_error(exact.attend(exact.always), exact.output),
        ),
    )
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.9))
        figure.subplots_adjust(left=0.065, right=0.985, bottom=0.15, top=0.78, wspace=0.17)
        for axes, (title, ours, theirs, floor) in zip((left, right), panels, strict=True):
            axes.set_xscale("log", base=2)
            if axes is right:
                axes.set_yscale("log")
            axes.axhline(floor, color=grey, linewidth=1.3, linestyle=(0, (1, 2)))
            axes.fill_between(budgets, ours, theirs, color=blue, alpha=0.07, linewidth=0)
            axes.plot(budgets, theirs, color=grey, linewidth=2, marker="o", markersize=5)
            axes.plot(budgets, ours, color=blue, linewidth=2.4, marker="o", markersize=6)
            axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=10)
            axes.set_xticks(budgets, [f"{b}\n{b / capacity:.1%}" for b in budgets])
            axes.set_xlabel(f"budget: heavy tokens chosen for a head, of {capacity}")
            axes.minorticks_off()
            # Exact top-k is the better curve: the upper one of mass, the lower one of error.
            up = 1 if axes is left else -1
            middle = (len(budgets) - 1) // 2
            for text, values, color, side in (
                ("exact top-k", theirs, grey, up),
                ("PQ index", ours, blue, -up),
            ):
                axes.annotate(
                    text,
                    (budgets[middle], values[middle]),
                    xytext=(-9 * side * up, 9 * side),
                    textcoords="offset points",
                    ha="right" if side == up else "left",
                    va="bottom" if side > 0 else "top",
                    color=color,
                    fontweight="bold",
                )
            axes.annotate(
                "sink and window alone",
                (1, floor),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                color=grey,
            )
        left.set_ylim(top=1)
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        low, high = min(panels[1][2]) / 1.15, max(panels[1][3], *panels[1][1]) * 1.25
        steps = [digit * 10.0**power for power in range(-6, 2) for digit in (1, 2, 5)]
        right.set_yticks([value for value in steps if low <= value <= high])
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        right.yaxis.set_minor_formatter(NullFormatter())
        right.set_ylim(low, high)
        heads, code_bytes = demo.sample.query.shape[1], demo.index.codes.shape[2]
        figure.text(
            0.012,
            0.955,
            f"Choosing tokens by codes of {code_bytes} bytes instead of keys of {2 * size}",
            fontsize=14,
            fontweight="bold",
            va="center",
        )
        figure.text(
            0.012,
            0.895,
            f"SmolLM2-135M, layer 15, {capacity} tokens of documentation; {SINK_SIZE} sink and "
            f"{WINDOW_SIZE} window tokens; means over {demo.steps} decode steps, {heads} heads",
            color=grey,
            va="center",
        )
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _budget(text: str) -> int:
    most = 4096
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(
            f"expected a number in 1..{most}, which is half of the context, got {text}"
        )
    return int(text)


def _unwritable(path: Path) -> str | None:
    """Says why no picture can be written there, or None."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        return f"expected a name that ends in .{', .'.join(sorted(kinds))}, got {path}"
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as problem:
        return f"expected a file that can be written, got {path}: {problem.strerror}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_indexer",
        description="Decodes over real keys with the PQ indexer, and compares with exact top-k.",
    )
    parser.add_argument(
        "--budgets",
        type=_budget,
        nargs="+",
        default=BUDGETS,
        metavar="N",
        help=f"heavy tokens of a head ({' '.join(map(str, BUDGETS))})",
    )
    parser.add_argument(
        "--num-subspaces", type=int, default=2, metavar="M", help="codes of a key (2)"
    )
    parser.add_argument("--num-bits", type=int, default=6, metavar="BITS", help="of a code (6)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo.png"), help="the picture to write (demo.png)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"decode {QUICK_STEPS} tokens instead of {STEPS}"
    )
    options = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Table
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        print(f"The demo needs {package}: python -m pip install matplotlib rich", file=sys.stderr)
        return 1
    if problem := _unwritable(options.out):
        parser.error(f"argument --out: {problem}")

    steps = QUICK_STEPS if options.quick else STEPS
    console = Console(highlight=False)
    try:
        with console.status("building the index"):
            demo = prepare(options.num_subspaces, options.num_bits, steps)
    except ValueError as problem:
        parser.error(str(problem))
    facts_table = Table.grid(padding=(0, 2, 0, 0))
    for name, text in facts(demo):
        facts_table.add_row(f"[bold]{name}[/]", text)
    console.print("[bold]PQ index against exact top-k, on real keys[/]\n")
    console.print(facts_table, "")
    results = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=len(options.budgets) * steps)
        for budget in options.budgets:
            bar.update(task, description=f"decoding with budget {budget}")
            results.append(demo.decode(budget, lambda: bar.advance(task)))
    show(console, demo, results)
    advise(console, demo, results)
    draw(options.out, demo, results)
    console.print(f"\nPicture: {options.out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
