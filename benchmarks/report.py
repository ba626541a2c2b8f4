"""`python -m benchmarks report`: tables and pictures of results, and the README's section."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.seed_figures import CALL_MS, KERNELS_US
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
ITERATION_4 = "torch:iteration4"
NOTHING = "-"
KINDS = ("named", "sweep", "build")

ABOUT_KERNELS = (
    "A step's kernel time in microseconds: medians of calls in a row, by CUPTI, all "
    "implementations in turns in one process after their outputs were found right. *p99*: of 1000 "
    "calls of ours, over the median. *Floor*: each candidate's codes read once at the measured "
    "copy bandwidth, or its look-ups at the measured rate, whichever takes longer, and one launch. "
    "The last two columns are wall-clock times: a step of ours in one `jit` of 20, and a replay of "
    "the fastest PyTorch form as a CUDA graph."
)
ABOUT_CALLS = "There was no GPU: times are wall-clock times of one call, in microseconds."
ABOUT_DETAILS = (
    "Kernel times with the data of the call before in the L2 cache (*warm*) and with an emptied "
    "one (*cold*), of programs compiled without command buffers, in which CUPTI misnames kernels; "
    "wall-clock times of a *call* with its wait, *amortised* over calls in a row, and between CUDA "
    "*events*, of programs as a user gets them. In brackets p20 to p80. What is slow was called "
    "fewer times."
)

Results = dict[str, Any]  # one file
Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # heads, cells


class DifferentDevices(ValueError):
    """Results of several devices were to be compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `report`."""
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        help="results to show, and no more; without any, the README's section and its pictures "
        "are made from those in benchmarks/results/",
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="where pictures go; default: the results'"
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; 1 if the README is stale"
    )


# Reading results


def load(files: Iterable[Path]) -> list[Results]:
    """Reads results files, the oldest first; each remembers its name. Other JSON is left out.

    Raises:
      DifferentDevices: if they were not all measured on one kind of device.
    """
    results = [json.loads(file.read_text()) | {"file": file.name} for file in files]
    results = [one for one in results if one.get("kind") in KINDS]
    devices: dict[str, list[str]] = {}
    for one in results:
        devices.setdefault(one["machine"]["device"], []).append(one["file"])
    if len(devices) > 1:
        raise DifferentDevices(
            "numbers of different devices are not compared; name the files of one of them: "
            + "; ".join(f"{device}: {', '.join(names)}" for device, names in devices.items())
        )
    return sorted(results, key=lambda one: (one["time"], one["file"]))


def by_workload(results: Sequence[Results]) -> dict[str, tuple[Results, list[Row]]]:
    """For each workload the latest run of it: rows are compared within one run only."""
    found: dict[str, tuple[Results, list[Row]]] = {}
    for one in results:
        if one["kind"] != "named":
            continue
        rows: dict[str, list[Row]] = {}
        for row in one["rows"]:
            rows.setdefault(row["workload"], []).append(row)
        found |= {name: (one, of_name) for name, of_name in rows.items()}
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


# The README


def provenance(one: Results) -> str:
    """Where numbers come from, in a line."""
    about = one["machine"]
    commit = one["commit"] or "not known"
    dirty = " with changes" if one["dirty"] else ""
    driver = f", driver {about['driver']}" if about["driver"] else ""
    versions = ", ".join(
        f"{label} {about[name]}"
        for label, name in (("JAX", "jax"), ("PyTorch", "torch"), ("Triton", "triton"))
        if about[name]
    )
    quick = ", few repetitions" if one["quick"] else ""
    return (
        f"`{one['command']}`, {one['seconds']:.0f} s{quick}: {about['device']}{driver}; "
        f"{versions}, Python {about['python']}; commit {commit[:12]}{dirty}; {one['time'][:10]}; "
        f"[{one['file']}](benchmarks/results/{one['file']})"
    )


def folded(summary: str, *blocks: str) -> list[str]:
    """Lines of Markdown that are shown when asked for."""
    inside = [line for block in blocks for line in (block, "")]
    return [f"<details><summary>{summary}</summary>", "", *inside, "</details>", ""]


def code(lines: Iterable[str]) -> str:
    """A block of commands."""
    return "\n".join(["```", *lines, "```"])


def section(results: Sequence[Results], pictures: Sequence[tuple[str, str]]) -> str:
    """The README's section, without its markers.

    Args:
      results: as `load` returns them.
      pictures: link and caption of each.

    Returns:
      Markdown.
    """
    workloads = by_workload(results)
    gpu = any(one["machine"]["gpu"] for one in results)
    used = {one["file"]: one for one, _ in workloads.values()}
    used |= {one["file"]: one for one in results if one["kind"] != "named"}
    shown = {caption: f"![{caption}]({link})" for link, caption in pictures}
    breakdowns = [shown.pop(caption) for caption in list(shown) if "Kernel time" in caption]
    lines = [
        ABOUT_KERNELS if gpu else ABOUT_CALLS,
        "",
        markdown(summary_table(workloads)),
        "",
        *(f"- {provenance(one)}" for one in used.values()),
        "",
    ]
    for picture in shown.values():
        lines += [picture, ""]
    if breakdowns:
        lines += folded("Kernels of a step, by what they are for", *breakdowns)
    if "seed" in workloads and named(workloads["seed"][1], ITERATION_4):
        lines += folded(
            "The four iterations of the original, as reported and here",
            "Microseconds between CUDA events around a call, then of kernels. The document does "
            "not name its GPU.",
            markdown(seed_table(workloads["seed"][1])),
        )
    for one in [one for one in results if one["kind"] == "build"][-1:]:
        lines += folded(
            "Building an index: <code>build_index</code>",
            "Milliseconds for all keys of a prompt; memory beside the keys; squared error of the "
            "codes' reconstruction, of normal keys. The original's k-means is beside it.",
            markdown(build_table(one["rows"])),
        )
    for name, (_, rows) in workloads.items():
        lines += folded(
            f"<code>{name}</code>: all implementations, and the command of each row",
            ABOUT_DETAILS if gpu else ABOUT_CALLS,
            markdown(detail_table(rows)),
            code(row["command"] for row in rows if row["status"] != "skipped"),
        )
    return "\n".join(lines).rstrip("\n")


def rewritten(readme: str, section: str) -> str:
    """The README with its section replaced.

    Raises:
      ValueError: if the markers are not there once each, in order.
    """
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(BEGIN) > readme.index(END)
    ):
        raise ValueError(f"expected {BEGIN} and {END} in the README, once each")
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def report(arguments: argparse.Namespace) -> int:
    """Shows results; of the committed ones, also draws pictures and rewrites the README's section.

    Returns:
      0, or 1 if `--check` finds the README stale, or results cannot be compared.
    """
    try:
        results = load(arguments.files or sorted(RESULTS.glob("*.json")))
        if not results:
            print(f"no results in {RESULTS}; show those of a run: python -m benchmarks report FILE")
            return 0
        if arguments.files:
            return show_all(results, arguments.pictures)
        folder = arguments.pictures or RESULTS
        wanted = pictures_of(results)
        links = [
            (_relative(folder / picture.file, arguments.readme), picture.caption)
            for picture in wanted
        ]
        old = arguments.readme.read_text()
        new = rewritten(old, section(results, links))
    except (OSError, ValueError) as error:
        print(f"report: {error}")
        return 1
    if arguments.check:
        missing = [p.file for p in wanted if not (folder / p.file).is_file()]
        if new == old and not missing:
            print(f"{arguments.readme} is up to date")
            return 0
        if new != old:
            print(f"{arguments.readme} is stale")
        if missing:
            print(f"pictures are missing: {', '.join(missing)}")
        print("make it again: python -m benchmarks report")
        return 1
    show_all(results, folder)
    arguments.readme.write_text(new)
    print(f"{arguments.readme} rewritten")
    return 0


def pictures_of(results: Sequence[Results]) -> list[Any]:
    """The pictures that results allow; matplotlib is not imported before it is needed."""
    from benchmarks import plots

    return plots.pictures(results)


def show_all(results: Sequence[Results], folder: Path | None) -> int:
    """Prints all tables and, into a folder, draws all pictures; returns 0."""
    workloads = by_workload(results)
    for name, (_, rows) in workloads.items():
        show(f"{name}, microseconds, median (p20..p80)", detail_table(rows))
    if workloads:
        show("all workloads, microseconds", summary_table(workloads))
    for one in results:
        if one["kind"] == "build":
            show("build_index, milliseconds", build_table(one["rows"]))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = pictures_of(results)
        for picture in wanted:
            picture.draw(folder / picture.file)
        print(f"{len(wanted)} pictures in {folder}")
    return 0


def _relative(path: Path, readme: Path) -> str:
    try:
        return path.resolve().relative_to(readme.resolve().parent).as_posix()
    except ValueError:
        return path.as_posix()
