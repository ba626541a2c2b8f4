"""Pictures of results: time against sizes, kernels by what they are for, speed-ups."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import (
    Results,
    Row,
    by_workload,
    fastest,
    iteration_4,
    time_of,
)

# Okabe and Ito's colours, which stay apart for the colour-blind, each with a marker of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"

AXES = {
    "length": ("tokens in the cache, L", lambda shape: max(_as_list(shape["L"]))),
    "batch": ("batch rows, B", lambda shape: shape["B"]),
    "subspaces": (
        "look-ups a key, M, and bits a code",
        lambda shape: (shape["config"]["num_subspaces"], shape["config"]["num_bits"]),
    ),
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that results allow.

    Attributes:
      file: its name.
      caption: what it shows.
      draw: writes it to a path.
    """

    file: str
    caption: str
    draw: Callable[[Path], None]


def pictures(results: Sequence[Results]) -> list[Picture]:
    """What can be drawn from results; nothing is drawn yet."""
    found = []
    workloads = {name: rows for name, (_, rows) in by_workload(results).items()}
    compared = {
        name: rows
        for name, rows in workloads.items()
        if fastest(rows, "jax") and fastest(rows, "torch")
    }
    if compared:
        found.append(
            Picture(
                "speed-up.png",
                "Speed-up over the fastest PyTorch form and over Iteration 4",
                functools.partial(draw_speed_up, compared),
            )
        )
    for framework, caption in (
        ("torch", "Kernel time of a step of the PyTorch forms, by stage"),
        ("jax", "Kernel time of our Pallas pipelines, by kernel"),
    ):
        broken_down = {
            name: shown
            for name, rows in workloads.items()
            if (shown := [row for row in rows if _has_breakdown(row, framework)])
        }
        if broken_down:
            found.append(
                Picture(
                    f"breakdown-{framework}.png",
                    caption,
                    functools.partial(draw_breakdown, broken_down),
                )
            )
    for sweep, (label, _) in AXES.items():
        if rows := _latest_sweep(results, sweep):
            found.append(
                Picture(
                    f"time-against-{sweep}.png",
                    f"Time of a step against {label}",
                    functools.partial(draw_sweep, rows, sweep),
                )
            )
    return found


def _latest_sweep(results: Sequence[Results], sweep: str) -> list[Row]:
    """Timed rows of the last results that have a sweep."""
    for one in reversed(results):
        rows = [row for row in one["rows"] if row.get("sweep") == sweep]
        if rows := [row for row in rows if time_of(row) is not None]:
            return rows
    return []


def _has_breakdown(row: Row, framework: str) -> bool:
    # XLA's bar would leave no room for ours.
    left_out = row["peer"] or row["implementation"] == "jax:xla"
    return row["framework"] == framework and not left_out and bool(row.get("breakdown"))


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _figure(rows: int, columns: int, width: float, height: float):
    # Not pyplot: it keeps figures in a global list and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure, path: Path) -> None:
    # Without a date, so that the same results give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _unit(rows: Sequence[Row]) -> str:
    if any(row.get("warm") for row in rows):
        return "kernel time, warm L2"
    return "wall-clock time a call"


def _label_times(axis, which: str) -> None:
    """Plain numbers on a logarithmic axis of microseconds."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{which}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def draw_sweep(rows: Sequence[Row], sweep: str, path: Path) -> None:
    """Time against a size: median, band from p20 to p80, floor."""
    label, size_of = AXES[sweep]
    figure, axes = _figure(1, 1, 7.5, 5)
    ax = axes[0, 0]
    sizes = sorted({size_of(row["shape"]) for row in rows})
    # Pairs of M and bits have no scale: they stand side by side.
    place = {size: i if isinstance(size, tuple) else size for i, size in enumerate(sizes)}
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for number, name in enumerate(names):
        line = sorted(
            (
                (place[size_of(row["shape"])], row.get("warm") or row["call"])
                for row in rows
                if row["implementation"] == name
            ),
            key=lambda point: point[0],
        )
        x = [point[0] for point in line]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        ax.plot(x, [t["median"] for _, t in line], color=colour, marker=marker, label=name)
        ax.fill_between(
            x,
            [t["p20"] for _, t in line],
            [t["p80"] for _, t in line],
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
    floors = {
        place[size_of(row["shape"])]: row["floor"]["us"]
        for row in rows
        if row.get("floor") and not row["peer"]
    }
    if floors:
        ax.plot(*zip(*sorted(floors.items()), strict=True), "k:", label="floor")
    ax.set_yscale("log")
    _label_times(ax.yaxis, "")
    if isinstance(sizes[0], tuple):
        ax.set_xticks(range(len(sizes)), [f"M={m}\n{bits} bits" for m, bits in sizes])
    else:
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [_size(size) for size in sizes])
        ax.minorticks_off()
    ax.set_xlabel(label)
    ax.set_ylabel(f"{_unit(rows)}, µs")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    _save(figure, path)


def _size(tokens: int) -> str:
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)


def draw_speed_up(workloads: dict[str, list[Row]], path: Path) -> None:
    """How many times faster our fastest selector is than two PyTorch forms."""
    figure, axes = _figure(1, 1, 7.5, 0.6 * len(workloads) + 1.5)
    ax = axes[0, 0]
    height = 0.38
    for place, rows in enumerate(workloads.values()):
        ours = fastest(rows, "jax")
        for number, (row, label) in enumerate(
            (
                (fastest(rows, "torch"), "over the fastest PyTorch form"),
                (iteration_4(rows), "over Iteration 4"),
            )
        ):
            if row is None or ours is None:
                continue
            factor = (time_of(row) or 0.0) / (time_of(ours) or 1.0)
            y = place + (number - 0.5) * height
            text = label if place == 0 else None
            ax.barh(y, factor - 1, height, left=1, color=COLOURS[number], label=text)
            ax.text(max(factor, 1), y, f" {factor:.1f}x", va="center", fontsize=8)
    ax.axvline(1, color="black", linewidth=1)
    ax.set_xscale("log")
    _label_times(ax.xaxis, "x")
    ax.set_yticks(range(len(workloads)), list(workloads))
    ax.invert_yaxis()
    ax.set_xlabel("speed-up (kernel time, warm L2)")
    ax.set_ylabel("workload")
    ax.margins(x=0.12)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    _save(figure, path)


def draw_breakdown(workloads: dict[str, list[Row]], path: Path) -> None:
    """Stacked kernel times, a panel a workload; a colour means the same in all of them."""
    columns = min(2, len(workloads))
    lines = -(-len(workloads) // columns)
    figure, axes = _figure(lines, columns, 6.5 * columns, 2.4 * lines + 0.8)
    groups = _largest_groups([row for rows in workloads.values() for row in rows])
    for ax, (name, rows) in zip(axes.flat, workloads.items(), strict=False):
        names = [row["implementation"] for row in rows]
        start = [0.0] * len(rows)
        for number, group in enumerate([*groups, "other"]):
            times = [_time_of_group(row, group, groups) for row in rows]
            colour = "#999999" if group == "other" else COLOURS[number]
            ax.barh(names, times, left=start, color=colour, edgecolor="white", label=group)
            start = [s + time for s, time in zip(start, times, strict=True)]
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("kernel time, µs (warm L2)")
        ax.set_ylabel("implementation")
        ax.invert_yaxis()
    for ax in axes.flat[len(workloads) :]:
        ax.set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    # A library's namespaces say less than the kernel's own name.
    labels = [label.rsplit("::", 1)[-1] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    _save(figure, path)


def _largest_groups(rows: Sequence[Row]) -> list[str]:
    """The groups with the largest share of a step anywhere, as many as there are colours."""
    share: dict[str, float] = {}
    for row in rows:
        total = sum(part["us"] for part in row["breakdown"])
        for part in row["breakdown"]:
            if part["group"] != "other":
                share[part["group"]] = max(share.get(part["group"], 0.0), part["us"] / total)
    return sorted(share, key=lambda group: -share[group])[: len(COLOURS)]


def _time_of_group(row: Row, group: str, known: Sequence[str]) -> float:
    """Kernel time of a row in a group; "other" is all that is in no known one."""
    return sum(
        part["us"]
        for part in row["breakdown"]
        if (part["group"] if part["group"] in known else "other") == group
    )
