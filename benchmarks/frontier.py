"""The frontier: a model's divergence from full attention against the time of a layer's kernels.

Times are those of `python -m benchmarks layer --frontier`, what a model says that of
`python -m examples.evaluate`; a config joins them.
"""

import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import KEYS, Results, Row
from jax_indexer import IndexerConfig

SWEEP = "frontier"
OURS = ("jax:cells", "jax:threshold", "jax:xla")
LENGTH = 131072
RECOMMENDED = ("fast", "balanced", "near-exact")
OTHERS = ("exact", "window")  # options that no config of ours stands for
ABOUT = ("model", "text", "prompt", "tokens")  # of an evaluation
OTHER_BUDGETS = "other budgets, rerank 8, rest by codes"


class Config(NamedTuple):
    """What a time and a model's divergence depend on; how codebooks were trained costs no time."""

    num_subspaces: int
    num_bits: int
    heavy_size: int
    rerank: int
    estimate_rest: str | bool

    @classmethod
    def of(cls, sizes: dict[str, Any]) -> "Config":
        """That of a results file."""
        return cls(*(sizes[name] for name in cls._fields))

    @property
    def codes(self) -> str:
        """Of a key."""
        return f"{self.num_subspaces} x {self.num_bits} bits"

    @property
    def rest(self) -> str:
        """What becomes of candidates that are not attended to."""
        return f"rest by {self.estimate_rest}" if self.estimate_rest else "no rest"


PLAIN = Config.of(vars(IndexerConfig()))

Shape = tuple[int, int]  # B, L
Times = dict[Shape, dict[Config | None, float]]  # None for full attention


class Evaluation(NamedTuple):
    """What a model says of a text.

    Attributes:
      about: the model, the text, how many tokens codebooks are of, and how many were decoded.
      files: the results files.
      rows: of each config, that of recommended codebooks, or of the best that were tried.
      exact: those of exact top-k, by its budget.
      names: of the recommended configs.
    """

    about: dict[str, Any]
    files: list[Results]
    rows: dict[Config, Row]
    exact: dict[int, Row]
    names: dict[Config, str]

    @property
    def text(self) -> str:
        """What was read, and how many tokens of it codebooks are of."""
        return f"{self.about['text']}, {self.about['prompt']}"


class Point(NamedTuple):
    """A config with both."""

    config: Config
    us: float
    divergence: float


def swept(results: Iterable[Results]) -> list[Results]:
    """The results that have points of the frontier, the oldest first."""
    return [one for one in results if any(row.get("sweep") == SWEEP for row in one["rows"])]


def times_of(results: Iterable[Results]) -> Times:
    """Median microseconds of kernels with an emptied L2 cache, the latest of each."""
    times: Times = {}
    for one in swept(results):
        for row in one["rows"]:
            name, shape = row["implementation"], one["workloads"][row["workload"]]
            of_full = name.startswith("jax:full")
            if row["status"] == "ok" and row.get("cold") and (of_full or name in OURS):
                config = None if of_full else Config.of(shape["config"])
                here = times.setdefault((shape["B"], shape["L"]), {})
                here[config] = row["cold"]["median"]
    return times


def read(folder: Path) -> list[Evaluation]:
    """What the files of a folder say of options, for each text, prompt and number of tokens.

    Rows with full attention in some layers are left out: configs are not all there is to them.

    Raises:
      ValueError: for a file that holds no evaluation.
    """
    files: dict[tuple[Any, ...], dict[str, Results]] = {}
    rows: dict[tuple[Any, ...], list[tuple[Config, Row]]] = {}
    for file in sorted(folder.glob("*.json")):
        try:
            one = json.loads(file.read_text())
            if one["measure"] != "options":
                continue
            about = {"file": file.name, "quick": False} | {
                x: one[x] for x in KEYS - {"quick", "rows"}
            }
            for row in one["rows"]:
                if "full_layers" not in row:
                    key = tuple({**one, **row}[name] for name in ABOUT)
                    files.setdefault(key, {})[file.name] = about
                    rows.setdefault(key, []).append((Config.of(row["config"]), row))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: expected an evaluation with configs: {error!r}") from None
    return [_evaluation(key, [*files[key].values()], rows[key]) for key in sorted(rows)]


def _evaluation(
    key: tuple[Any, ...], files: list[Results], rows: list[tuple[Config, Row]]
) -> Evaluation:
    by_rank = sorted(rows, key=lambda x: (x[1]["option"] in RECOMMENDED, -x[1]["divergence"]))
    configs = {config: row for config, row in by_rank if row["option"] not in OTHERS}
    exact = {row["budget"]: row for _, row in rows if row["option"] == "exact"}
    usual = {x: row for x, row in configs.items() if x.heavy_size == PLAIN.heavy_size}
    names = {x: row["option"] for x, row in usual.items() if row["option"] in RECOMMENDED}
    return Evaluation(dict(zip(ABOUT, key, strict=True)), files, configs, exact, names)


def in_order(configs: Iterable[Config]) -> list[Config]:
    """Configs, the usual codes and budget first, in the order of a table."""
    unusual = lambda x: (x[:2] != PLAIN[:2], x[2] != PLAIN[2])  # noqa: E731
    by_end = lambda x: (str(x.estimate_rest), x.rerank)  # noqa: E731
    return sorted(configs, key=lambda x: (*unusual(x), *x[:3], *by_end(x)))


def points(times: Times, evaluation: Evaluation, shape: Shape) -> list[Point]:
    """The configs that were timed at this shape and evaluated."""
    rows = evaluation.rows
    return [
        Point(config, us, rows[config]["divergence"])
        for config, us in times.get(shape, {}).items()
        if config in rows
    ]


def families(found: Iterable[Point]) -> dict[str, list[Point]]:
    """Points that differ in one thing, in the order of their times, by what they share."""
    lines: dict[str, list[Point]] = {}
    for point in sorted(found, key=lambda point: point.us):
        config = point.config
        here = []
        if config[:3] == PLAIN[:3]:
            here.append(config.rest)
        if config[:2] != PLAIN[:2]:
            here.append(f"{config.codes}, {config.rest}")
        elif config[3:] == (8, "codes"):
            here.append(OTHER_BUDGETS)
        for name in here:
            lines.setdefault(name, []).append(point)
    return {name: lines[name] for name in sorted(lines, key=lambda name: (name[0].isdigit(), name))}


# The picture

COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#000000")
MARKERS = "osD^vPX"


def draw(times: Times, evaluations: Sequence[Evaluation], shape: Shape, path: Path) -> None:
    """Divergence against time, a panel for each text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 5.5 * len(evaluations), 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(evaluations), sharey=True, squeeze=False)[0]
    lines: dict[str, Any] = {}
    for axes, evaluation in zip(panels, evaluations, strict=True):
        lines = _draw_panel(axes, times, evaluation, shape) | lines
    panels[0].set_ylabel("divergence of the model's predictions, KL(full, sparse)")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw_panel(axes: Any, times: Times, evaluation: Evaluation, shape: Shape) -> dict[str, Any]:
    """One text; the handles of a legend."""
    from matplotlib.ticker import FuncFormatter

    found, about = points(times, evaluation, shape), evaluation.about
    axes.set(xscale="log", yscale="log", xlabel="kernels of a layer's step, µs")
    title = "{model}, {text}: codebooks of {prompt} tokens, {tokens} decoded"
    axes.set_title(title.format(**about), fontsize=10)
    lines = {}
    looks = itertools.cycle(zip(COLOURS, MARKERS, strict=True))
    for (name, line), (colour, marker) in zip(families(found).items(), looks, strict=False):
        place = zip(*((point.us, point.divergence) for point in line), strict=True)
        (lines[name],) = axes.plot(*place, color=colour, marker=marker, markersize=5)
    put = functools.partial(axes.annotate, textcoords="offset points", fontsize=8)
    for config, us, divergence in found:
        usual = config.heavy_size == PLAIN.heavy_size
        text = f"x{config.rerank}" if usual else f"budget {config.heavy_size}"
        if config[:2] == PLAIN[:2] and config.rerank > 1:
            put(text, (us, divergence), xytext=(4, 4), color="#666666")
        if name := evaluation.names.get(config):
            axes.plot(us, divergence, "o", markersize=12, fillstyle="none", color="black")
            put(name, (us, divergence), xytext=(-9, -12), ha="right", fontweight="bold")
    if exact := evaluation.exact.get(PLAIN.heavy_size):
        name = f"exact top-k, budget {PLAIN.heavy_size}, which reads all keys"
        lines[name] = axes.axhline(exact["divergence"], color="black", linestyle="--")
    if full := times[shape].get(None):
        lines["full attention: no divergence"] = axes.axvline(full, color="black", linestyle=":")
        put(f"{full:.0f} µs", (full, 0.5), xycoords=("data", "axes fraction"), xytext=(-4, 0),
            ha="right")  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.set_xlim(left=0.6 * min(point.us for point in found))
    axes.set_xticks([20, 30, 50, 70, 100, 200, 500, 1000])
    axes.grid(alpha=0.3)
    return lines
