"""Results as they were written, the rows to compare, and tables of them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.seed_figures import CALL_MS, KERNELS_US
from parity.inputs import WORKLOADS

ITERATION_4 = "torch:iteration4"
NOTHING = "-"
KINDS = ("named", "sweep", "build", "decode")
KEYS = {"time", "command", "commit", "dirty", "machine", "quick", "seconds", "rows"}

Results = dict[str, Any]  # one file
Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # heads, cells


class DifferentDevices(ValueError):
    """Results of several devices were to be compared."""


# Reading results


def load(files: Iterable[Path], *, others: bool = False) -> list[Results]:
    """Reads results files, the oldest first; each remembers its name.

    Args:
      files: what to read.
      others: leave out JSON of other kinds than KINDS instead of refusing it.

    Raises:
      ValueError: for a file that holds no results of a kind in KINDS.
      DifferentDevices: if they were not all measured on one kind of device.
    """
    read = [_read(file, others) for file in files]
    results = [one for one in read if one is not None]
    devices: dict[str, list[str]] = {}
    for one in results:
        devices.setdefault(one["machine"]["device"], []).append(one["file"])
    if len(devices) > 1:
        raise DifferentDevices(
            "numbers of different devices are not compared; name the files of one of them: "
            + "; ".join(f"{device}: {', '.join(names)}" for device, names in devices.items())
        )
    return sorted(results, key=lambda one: (one["time"], one["file"]))


def _read(file: Path, others: bool) -> Results | None:
    try:
        results = json.loads(file.read_text())
        kind, missing = results.get("kind"), KEYS - results.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: expected a results file of this program: {error}") from None
    if kind not in KINDS:
        if others:
            return None
        raise ValueError(f"{file}: expected results of a kind in {', '.join(KINDS)}, got {kind}")
    if missing:
        raise ValueError(f"{file}: expected {', '.join(sorted(missing))} too, got none of these")
    return results | {"file": file.name}


def by_workload(results: Sequence[Results]) -> dict[str, tuple[Results, list[Row]]]:
    """For each workload the latest run of it: rows are compared within one run only.

    One that measured nothing of it, because it was skipped or interrupted, hides no earlier one.
    """
    found: dict[str, tuple[Results, list[Row]]] = {}
    for one in results:
        if one["kind"] != "named":
            continue
        rows: dict[str, list[Row]] = {}
        for row in one["rows"]:
            rows.setdefault(row["workload"], []).append(row)
        for name, of_name in rows.items():
            if name not in found or any(row["status"] == "ok" for row in of_name):
                found[name] = one, of_name
    order = {name: place for place, name in enumerate(WORKLOADS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def time_of(row: Row) -> float | None:
    """What a row is compared by, in microseconds: warm kernels; a call where there is no GPU."""
    measured = row.get("warm") or (None if row.get("floor") else row.get("call"))
    return measured["median"] if row["status"] == "ok" and measured else None


def fastest(rows: Iterable[Row], framework: str) -> Row | None:
    """The fastest indexer of a framework, or None."""
    timed = [
        row
        for row in rows
        if row["framework"] == framework and not row["peer"] and time_of(row) is not None
    ]
    return min(timed, key=lambda row: time_of(row) or 0.0, default=None)


def named(rows: Iterable[Row], implementation: str) -> Row | None:
    """The timed row of an implementation, or None."""
    return next(
        (r for r in rows if r["implementation"] == implementation and time_of(r) is not None), None
    )


def iteration_4(rows: Sequence[Row]) -> Row | None:
    """Iteration 4, launched kernel by kernel or, where only that was timed, as a CUDA graph."""
    return named(rows, ITERATION_4) or named(rows, f"{ITERATION_4}-graph")


# Tables


def us(value: float | None) -> str:
    """Microseconds with three figures."""
    if value is None:
        return NOTHING
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def median(row: Row, kind: str) -> float | None:
    """Median of one kind of time, or None."""
    return row[kind]["median"] if row.get(kind) else None


def spread(row: Row, kind: str) -> str:
    """Median and the range from p20 to p80."""
    if not row.get(kind):
        return NOTHING
    return f"{us(row[kind]['median'])} ({us(row[kind]['p20'])}..{us(row[kind]['p80'])})"


def floor_ratio(row: Row) -> str:
    """Cold kernel time over the floor: warm data need not come from memory, so may beat it."""
    if not row.get("floor") or not row.get("cold"):
        return NOTHING
    return f"{row['cold']['median'] / row['floor']['us']:.1f}x"


def tail(row: Row | None) -> str:
    """How far the slowest hundredth of warm calls is from the median."""
    if not row or not row.get("warm") or row["warm"]["count"] < 100:
        return NOTHING
    return f"{row['warm']['p99'] / row['warm']['median']:.2f}"


def ratio(one: float | None, other: float | None, mark: str = "") -> str:
    """How many times `other` goes into `one`."""
    return f"{mark}{one / other:.1f}x{mark}" if one and other else NOTHING


def graph_replay(rows: Sequence[Row]) -> float | None:
    """Amortised replay of the fastest CUDA graph, in microseconds."""
    graphs = [row for row in rows if row["implementation"].endswith("-graph")]
    return min((t for row in graphs if (t := median(row, "amortised"))), default=None)


def short(row: Row | None) -> str:
    """An implementation and its time."""
    if row is None:
        return NOTHING
    return f"{us(time_of(row))} `{row['implementation'].partition(':')[2]}`"


def summary_table(workloads: dict[str, tuple[Results, list[Row]]]) -> Table:
    """One line a workload: ours, the fastest PyTorch form, Iteration 4, the floor."""
    heads = [
        "workload",
        "ours",
        "p99",
        "PyTorch, fastest",
        "speed-up",
        "Iteration 4",
        "speed-up",
        "floor",
        "ours / floor",
        "in one jit",
        "graph replay",
    ]
    lines = []
    for name, (_, rows) in workloads.items():
        ours, torch, last = fastest(rows, "jax"), fastest(rows, "torch"), iteration_4(rows)
        time = time_of(ours) if ours else None
        least = ours["floor"]["us"] if ours and ours.get("floor") else None
        lines.append(
            [
                f"`{name}`",
                short(ours),
                tail(ours),
                short(torch),
                ratio(time_of(torch) if torch else None, time, "**"),
                us(time_of(last) if last else None),
                ratio(time_of(last) if last else None, time, "**"),
                us(least),
                ratio(time, least),
                us(median(ours or {}, "in_jit")),
                us(graph_replay(rows)),
            ]
        )
    return without_empty_columns((heads, lines))


def milliseconds(row: Row, kind: str) -> str:
    """Median of one kind of time in milliseconds."""
    found = median(row, kind)
    return NOTHING if found is None else us(found / 1e3)


def build_table(rows: Sequence[Row]) -> Table:
    """What was measured of build_index, in milliseconds and MiB."""
    heads = [
        "workload", "implementation", "kernels", "append's", "a build", "launches", "MiB",
        "of the keys", "error", "note",
    ]  # fmt: skip
    lines = []
    for row in rows:
        name = [f"`{row['workload']}`", f"`{row['implementation']}`"]
        if row["status"] != "ok":
            lines.append([*name, *[NOTHING] * 7, f"{row['status']}: {row['reason']}"])
            continue
        memory = row["memory_bytes"]
        lines.append(
            [
                *name,
                *(
                    us((median(row, kind) or 0) / 1e3 or None)
                    for kind in ("warm", "append", "call")
                ),
                str(row.get("launches", NOTHING)),
                NOTHING if memory is None else f"{memory / 2**20:.0f}",
                NOTHING if memory is None else f"{memory / row['key_bytes']:.2f}x",
                f"{row['error']:.3f}",
                NOTHING,
            ]
        )
    return without_empty_columns((heads, lines))


def decode_table(rows: Sequence[Row]) -> Table:
    """Steps of a decode, in microseconds."""
    heads = ["workload", "steps", "segment", "median", "mean", "p99", "max", "max / median", "note"]
    lines = []
    for row in rows:
        name = f"`{row['workload']}`"
        if row["status"] != "ok":
            note = f"{row['status']}: {row['reason']}"
            lines.append([name, *[NOTHING] * (len(heads) - 2), note])
            continue
        times = row["warm"]
        lines.append(
            [
                name,
                str(row["steps"]),
                str(row["segment"]),
                us(times["median"]),
                us(row["mean_of_a_segment"]),
                us(times["p99"]),
                us(times["max"]),
                ratio(times["max"], times["median"]),
                NOTHING,
            ]
        )
    return without_empty_columns((heads, lines))


def detail_table(rows: Sequence[Row]) -> Table:
    """All that was measured of one workload."""
    heads = [
        "implementation",
        "kernels, warm",
        "p99",
        "calls",
        "kernels, cold",
        "launches",
        "a call",
        "events",
        "amortised",
        "in one jit",
        "MiB",
        "compile, s",
        "floor",
        "cold / floor",
        "note",
    ]
    lines = []
    for row in rows:
        name = f"`{row['implementation']}`"
        if row["status"] != "ok":
            note = f"{row['status']}: {row['reason']}"
            lines.append([name, *[NOTHING] * (len(heads) - 2), note])
            continue
        memory = row.get("memory_bytes")
        lines.append(
            [
                name,
                spread(row, "warm"),
                tail(row),
                str(row["warm"]["count"]) if row.get("warm") else NOTHING,
                spread(row, "cold"),
                str(row.get("launches", NOTHING)),
                spread(row, "call"),
                spread(row, "event"),
                us(median(row, "amortised")),
                us(median(row, "in_jit")),
                NOTHING if memory is None else f"{memory / 2**20:.1f}",
                f"{row['compile_seconds']:.1f}",
                us(row["floor"]["us"]) if row.get("floor") else NOTHING,
                floor_ratio(row),
                row["reason"] or NOTHING,
            ]
        )
    return without_empty_columns((heads, lines))


def without_empty_columns(table: Table) -> Table:
    """The table without what was not measured for any row."""
    heads, lines = table
    kept = [i for i in range(len(heads)) if i == 0 or any(line[i] != NOTHING for line in lines)]
    return [heads[i] for i in kept], [[line[i] for i in kept] for line in lines]


def group_us(row: Row, group: str) -> float | None:
    """Kernel time of a row that belongs to one group, or None if there is none."""
    parts = [part["us"] for part in row.get("breakdown", ()) if part["group"] == group]
    return sum(parts) if parts else None


def seed_table(rows: Sequence[Row]) -> Table:
    """The seed's figures of its iterations next to ours."""
    groups = ["score", "top-k", "sort", "index generation"]
    heads = ["", "mean", "median", "min", "max", "std", *groups, "other", "all kernels"]
    lines = []
    for iteration, wall in CALL_MS.items():
        number = iteration.removeprefix("iteration")
        lines.append(
            [
                f"Iteration {number}, the seed's",
                *(NOTHING if ms is None else us(ms * 1e3) for ms in wall),
                *(us(KERNELS_US[iteration][group]) for group in groups),
                NOTHING,
                NOTHING,
            ]
        )
        row = named(rows, f"torch:{iteration}")
        if row is None or not row.get("event"):
            lines.append([f"Iteration {number}, here", *[NOTHING] * (len(heads) - 1)])
            continue
        event = row["event"]
        lines.append(
            [
                f"Iteration {number}, here",
                *(us(event[name]) for name in ("mean", "median", "min", "max", "std")),
                *(us(group_us(row, group)) for group in (*groups, "other")),
                us(time_of(row)),
            ]
        )
    return heads, lines


def markdown(table: Table) -> str:
    """A table in Markdown."""
    heads, lines = table
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in r) + " |" for r in rows)


def show(title: str, table: Table) -> None:
    """Prints a table to the terminal; as Markdown where rich is not installed."""
    heads, lines = table
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        print(f"\n{title}\n{markdown(table)}")
        return
    shown = RichTable(title=title, title_justify="left")
    for number, head in enumerate(heads):
        at_side = number == 0 or head == "note"
        shown.add_column(head, justify="left" if at_side else "right", overflow="fold")
    for line in lines:
        shown.add_row(*(Text(cell.replace("`", "").replace("**", "")) for cell in line))
    console = Console()
    if not console.is_terminal:
        console.width = 240  # A log has no width to keep to.
    console.print(shown)


def print_results(results: Results) -> None:
    """Prints the tables of one run."""
    rows: dict[str, list[Row]] = {}
    for row in results["rows"]:
        rows.setdefault(row["workload"], []).append(row)
    for name, of_name in rows.items():
        show(
            f"{name}, microseconds, median (p20..p80), {results['machine']['device']}",
            detail_table(of_name),
        )
