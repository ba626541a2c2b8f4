"""The demo: decodes the second half of a real text with an index of the first half of its keys.

`python -m jax_indexer --help` lists its options.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    PQIndex,
    Rope,
    append,
    build_index,
    decode_attention,
    select,
)
from jax_indexer.config import Estimate, Implementation
from jax_indexer.data import Sample, load_sample

BUDGETS = (32, 64, 128, 256, 512, 1024)
# 64 + 64 tokens suit a context of 8192; the defaults of 128 + 128 are for longer ones.
SINK_SIZE = WINDOW_SIZE = 64
STEPS, QUICK_STEPS = 128, 16
APPENDED = 128  # tokens at once
ROPE_BASE = 100_000.0  # of the sample's model, whose pairs are interleaved


class Way(NamedTuple):
    """A way to attend."""

    name: str
    looks_ahead: bool = True
    rerank: int = 1
    estimate_rest: Estimate = False


EXACT, ESTIMATED = "exact top-k", "+ the rest"

# Each with one thing more than the one before it.
WAYS = (
    Way("plain PQ", looks_ahead=False),
    Way("look-ahead"),
    Way(ESTIMATED, estimate_rest="codes"),
    Way("+ rerank 4", estimate_rest="codes", rerank=4),
)


class Quality(NamedTuple):
    """Means over steps and query heads."""

    error: float  # of the output, against full attention
    mass: float  # of attention on what is attended to, sink and window included


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

    def best_of(self, listed: Int[np.ndarray, "T N P"], budget: int) -> Bool[np.ndarray, "T N S"]:
        """Sink, window and the best candidates of lists that end in -1."""
        among = np.zeros(self.rank.shape, bool)
        t, head, place = np.nonzero(listed >= 0)
        among[t, head, listed[t, head, place]] = True
        rank = np.where(among, self.rank, len(self._value))
        last = np.partition(rank, budget - 1, axis=-1)[..., budget - 1 : budget]
        return self.always | (among & (rank <= last))

    def mass(self, attended: Bool[np.ndarray, "T N S"]) -> float:
        """The share of the attention weights on these tokens, mean over rows."""
        return float(np.where(attended, self.weights, 0).sum(axis=-1).mean())

    def attend(self, attended: Bool[np.ndarray, "T N S"]) -> Float[np.ndarray, "T N H"]:
        """Attention over these tokens alone."""
        kept = np.where(attended, self.weights, 0)
        return kept @ self._value / kept.sum(axis=-1, keepdims=True)

    def quality(self, attended: Bool[np.ndarray, "T N S"]) -> Quality:
        """That of attention over these tokens alone."""
        return Quality(relative_error(self.attend(attended), self.output), self.mass(attended))


def relative_error(output: Float[np.ndarray, "T N H"], truth: Float[np.ndarray, "T N H"]) -> float:
    """|output - truth| / |truth| in the Euclidean norm of a row, mean over rows."""
    distance = np.linalg.norm(output - truth, axis=-1)
    return float(np.mean(distance / np.linalg.norm(truth, axis=-1)))


@dataclasses.dataclass(frozen=True)
class Result:
    """What one budget gives."""

    budget: int
    quality: dict[str, Quality]  # by the names of WAYS, and EXACT


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def decode_steps(
    cache: DecodeCache,
    query: Float[jax.Array, "T 1 1 N H"],
    key: Float[jax.Array, "T 1 1 1 H"],
    value: Float[jax.Array, "T 1 1 1 H"],
    *,
    config: IndexerConfig,
    implementation: Implementation,
) -> tuple[Float[jax.Array, "T N H"], Int[jax.Array, "T N P"]]:
    """Decodes T tokens one by one; the outputs, and what the attended were chosen from."""

    def step(cache: DecodeCache, new: tuple[jax.Array, ...]) -> tuple[DecodeCache, Any]:
        query, key, value = new
        out, cache = decode_attention(
            query, key, value, cache, config, implementation=implementation
        )
        pool = select(query, cache.index, config.pool, implementation=implementation)
        return cache, (out[0, 0], pool.indices[0, 0])

    return lax.scan(step, cache, (query, key, value))[1]


@dataclasses.dataclass(frozen=True)
class Demo:
    """Indices of the first half of a sample, grown to where its last `steps` positions begin."""

    sample: Sample
    steps: int
    config: IndexerConfig
    plain: PQIndex
    ahead: PQIndex
    build_seconds: float
    implementation: Implementation
    exact: Exact

    def decode(self, budget: int, way: Way) -> Quality:
        """Decodes one way with one budget, and compares with full attention."""
        config = dataclasses.replace(
            self.config, heavy_size=budget, rerank=way.rerank, estimate_rest=way.estimate_rest
        )
        index = self.ahead if way.looks_ahead else self.plain
        if not way.estimate_rest:
            index = dataclasses.replace(index, values=None)
        key, value = (jnp.asarray(x) for x in (self.sample.key, self.sample.value))
        # Float16 arithmetic would hide the differences to be shown.
        query = jnp.asarray(self.sample.query[-self.steps :], jnp.float32)
        new = (x[-self.steps :, None, None] for x in (query, key, value))
        outputs, pools = decode_steps(
            DecodeCache(key[None], value[None], index),
            *new,
            config=config,
            implementation=self.implementation,
        )
        attended = self.exact.best_of(np.asarray(pools), budget)
        error = relative_error(np.asarray(outputs, np.float64), self.exact.output)
        return Quality(error, self.exact.mass(attended))

    def compare(self, budget: int, on_way: Callable[[], None] = lambda: None) -> Result:
        """All ways with one budget, and exact top-k."""
        quality = {}
        for way in WAYS:
            quality[way.name] = self.decode(budget, way)
            on_way()
        return Result(budget, quality | {EXACT: self.exact.quality(self.exact.top(budget))})


def prepare(num_subspaces: int, num_bits: int, steps: int) -> Demo:
    """Builds indices on the first half of the sample, and appends all but the last `steps`."""
    sample = load_sample()
    # The subspaces hold the cosines and the sines of RoPE's pairs, as is recommended.
    config = IndexerConfig(
        num_subspaces=num_subspaces,
        num_bits=num_bits,
        grouping="strided",
        sink_size=SINK_SIZE,
        window_size=WINDOW_SIZE,
        estimate_rest="codes",
    )
    key, value = (jnp.asarray(x)[None] for x in (sample.key, sample.value))
    capacity, size = key.shape[1], key.shape[3]
    half, end = capacity // 2, capacity - steps

    def grown(**ahead: Any) -> PQIndex:
        index = build_index(key, jnp.array([half], jnp.int32), config, value=value, **ahead)
        for start in range(half, end, APPENDED):
            new = key[:, start : min(start + APPENDED, end)]
            index = append(index, new, config, value=value)
        return jax.block_until_ready(index)

    start = time.perf_counter()
    plain = grown()
    ahead = grown(rope=Rope.from_base(ROPE_BASE, size, "interleaved"), look_ahead=capacity - half)
    return Demo(
        sample=sample,
        steps=steps,
        config=config,
        plain=plain,
        ahead=ahead,
        build_seconds=time.perf_counter() - start,
        implementation=_implementation(sample, DecodeCache(key, value, plain), config),
        exact=Exact(sample, steps),
    )


def _implementation(sample: Sample, cache: DecodeCache, config: IndexerConfig) -> Implementation:
    """The name of what `implementation=None` picks here."""
    if jax.default_backend() == "gpu":
        query = jnp.asarray(sample.query[None, :1], jnp.float32)
        new = query, cache.key[:, :1], cache.value[:, :1]
        try:
            jax.eval_shape(
                functools.partial(decode_attention, config=config, implementation="triton"),
                *new,
                cache=cache,
            )
        except NotImplementedError:
            return "xla"
        return "triton"
    return "xla"


# --- what is shown --------------------------------------------------------------------------------


def _kilobytes(count: int) -> str:
    return f"{count / 1000:,.1f} kB"


def facts(demo: Demo) -> list[tuple[str, str]]:
    """What a reader of the table must know, as (name, text)."""
    config, index, sample = demo.config, demo.ahead, demo.sample
    capacity, _, size = sample.key.shape
    half = capacity // 2
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
            f"{config.num_subspaces} subspaces x {config.num_bits} bits, trained on the first "
            f"{half} tokens, once as they are and once looking {capacity - half} ahead; "
            f"{capacity - half - demo.steps} tokens appended: {demo.build_seconds:.1f} s, "
            f"compilation included; then {demo.steps} tokens decoded one by one",
        ),
        (
            "Memory",
            f"{_kilobytes(index_bytes)} for the index (codes {_kilobytes(index.codes.nbytes)}, "
            f"codebooks {_kilobytes(index.codebooks.nbytes)}, the others for the rest), "
            f"{_kilobytes(key_bytes)} for the keys in float16: {index_bytes / key_bytes:.1%}; "
            "only the codes grow with the context",
        ),
        (
            "Always",
            f"{SINK_SIZE} sink and {WINDOW_SIZE} window tokens, enough at this length (the "
            "defaults of 128 are for longer contexts); the budget comes on top",
        ),
    ]


def show(console: Any, demo: Demo, results: Sequence[Result]) -> None:
    """Prints the tables of results; `console` is a rich Console."""
    from rich import box
    from rich.table import Table

    names = [*(way.name for way in WAYS), EXACT]
    for title, of in (("Output error", "error"), ("Attention mass kept", "mass")):
        table = Table(
            title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False
        )
        for header in ("Budget", *names):
            table.add_column(header, justify="right", no_wrap=True)
        for result in results:
            cells = [f"{getattr(result.quality[name], of):.4f}" for name in names]
            table.add_row(f"[bold]{result.budget}[/]", *cells)
        console.print(table, "")
    rows = demo.steps * demo.sample.query.shape[1]
    console.print(
        f"[dim]Means over {rows} rows ({demo.steps} steps, {demo.sample.query.shape[1]} heads). "
        "Output error: |o - full| / |full|. Mass: share of full attention's weights on the "
        "attended tokens. Look-ahead: codebooks are trained on keys turned to the positions that "
        "follow, too. The rest: what is not attended to is estimated. Rerank: the best by their "
        "keys among 4 times the budget.[/]"
    )


def advise(console: Any, demo: Demo, results: Sequence[Result]) -> None:
    """Prints what the figures mean for another model, and what to do next."""
    usual = IndexerConfig().heavy_size
    result = min(results, key=lambda result: abs(result.budget - usual))
    plain, *_, best = WAYS
    errors = (result.quality[name].error for name in (plain.name, best.name, EXACT))
    config = demo.config
    console.print(
        "\n[bold]For your own model.[/] At a budget of {} a head's output moves by {:.1%} of its "
        "length on average with plain PQ, by {:.1%} with all of it, by {:.1%} with exact "
        "top-k.".format(result.budget, *errors)
        + " Heads that look for one token suffer first, so judge by your model's own predictions, "
        "for which rerank=8 is recommended."
    )
    console.print(
        f"[bold]Next.[/] IndexerConfig(num_subspaces={config.num_subspaces}, "
        f'num_bits={config.num_bits}, heavy_size={result.budget}, grouping="{config.grouping}", '
        f'estimate_rest="codes", rerank={best.rerank}), then prefill with rope and look_ahead, and '
        "decode_attention: README.md, Use."
    )


INK, GREY, FAINT = "#24292f", "#767c86", "#c4c9d0"
BLUES = ("#a9c9ee", "#5d9bdd", "#0b62c4", "#08305f")
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ecf0",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "savefig.facecolor": "white",
}


def draw(path: Path, demo: Demo, results: Sequence[Result]) -> None:
    """Draws output error and attention mass against the budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    results = sorted(results, key=lambda result: result.budget)
    names = [*(way.name for way in WAYS), EXACT]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.2))
        figure.subplots_adjust(left=0.065, right=0.985, bottom=0.14, top=0.74, wspace=0.17)
        _draw_lines(left, demo, results, "error", names)
        # With the rest the same tokens are attended to.
        _draw_lines(right, demo, results, "mass", [x for x in names if x != ESTIMATED])
        bold = {"loc": "left", "fontsize": 11.5, "fontweight": "bold", "pad": 10}
        left.set_title("Error of the attention output, relative", **bold)
        right.set_title("Attention mass kept", **bold)
        right.set_ylim(top=1)
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        left.set_yscale("log")
        low, high = left.dataLim.intervaly
        ticks = [digit * 10.0**power for power in range(-6, 2) for digit in (1, 2, 5)]
        left.set_yticks([value for value in ticks if 0.85 * low <= value <= 1.3 * high])
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        left.yaxis.set_minor_formatter(NullFormatter())
        left.set_ylim(0.85 * low, 1.3 * high)
        _write_head(figure, demo)
        lines = left.get_legend_handles_labels()
        place = {"loc": "center left", "bbox_to_anchor": (0.004, 0.845), "frameon": False}
        figure.legend(*lines, ncols=len(names), **place)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _draw_lines(
    axes: Any, demo: Demo, results: Sequence[Result], of: str, names: Sequence[str]
) -> None:
    """A line for each way, and one for no budget at all."""
    budgets, capacity = [result.budget for result in results], len(demo.sample.key)
    colours = dict(zip([way.name for way in WAYS], BLUES, strict=True)) | {EXACT: GREY}
    for name in names:
        line = [getattr(result.quality[name], of) for result in results]
        look = {"color": colours[name], "linestyle": "--" if name == EXACT else "-"}
        axes.plot(budgets, line, marker="o", markersize=5, label=name, **look)
    floor = getattr(demo.exact.quality(demo.exact.always), of)
    axes.axhline(floor, color=GREY, linewidth=1.3, linestyle=(0, (1, 2)))
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [f"{b}\n{b / capacity:.1%}" for b in budgets])
    axes.set_xlabel(f"budget: heavy tokens chosen for a head, of {capacity}")
    axes.minorticks_off()
    axes.annotate(
        "sink and window alone",
        (1, floor),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=GREY,
    )


def _write_head(figure: Any, demo: Demo) -> None:
    capacity, _, size = demo.sample.key.shape
    about = (
        f"Codes of {demo.ahead.codes.shape[2]} bytes for keys of {2 * size}: SmolLM2-135M, layer "
        f"15, {capacity} tokens; sink and window of {SINK_SIZE}; means over {demo.steps} steps, "
        f"{demo.sample.query.shape[1]} heads"
    )
    title = "Decoding the second half of a text with an index of the first"
    figure.text(0.012, 0.955, title, fontsize=14, fontweight="bold", va="center")
    figure.text(0.012, 0.898, about, color=GREY, va="center")


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
        description="Decodes the second half of a real text with an index of the first half.",
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
        with console.status("building indices"):
            demo = prepare(options.num_subspaces, options.num_bits, steps)
    except ValueError as problem:
        parser.error(str(problem))
    facts_table = Table.grid(padding=(0, 2, 0, 0))
    for name, text in facts(demo):
        facts_table.add_row(f"[bold]{name}[/]", text)
    console.print("[bold]The second half of a text, decoded with an index of the first[/]\n")
    console.print(facts_table, "")
    with (
        Progress(
            TextColumn("decoding"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
        ) as bar,
        ThreadPoolExecutor() as pool,  # most of the time is spent compiling
    ):
        task = bar.add_task("", total=len(options.budgets) * len(WAYS))
        compare = functools.partial(demo.compare, on_way=lambda: bar.advance(task))
        results = list(pool.map(compare, options.budgets))
    show(console, demo, results)
    advise(console, demo, results)
    draw(options.out, demo, results)
    console.print(f"\nPicture: {options.out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
