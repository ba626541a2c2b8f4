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

ABOUT_KERNELS = (
    "Times are sums of kernel times by CUPTI, with the data of the call before in the L2 cache / "
    "with an emptied one. *In one jit*: wall-clock time of a step in a chain of 20, launches "
    "included, to compare with the *graph replay* of the fastest recorded PyTorch form. *Floor*: "
    "each candidate's codes read once at the measured copy bandwidth, or its look-ups at the "
    "measured rate, whichever takes longer, and one launch."
)
ABOUT_CALLS = "There was no GPU: times are wall-clock times of one call."

Results = dict[str, Any]  # one file
Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # heads, cells


class DifferentDevices(ValueError):
    """Results of several devices were to be compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `report`."""
    parser.add_argument(
        "files", nargs="*", type=Path, help="results; default: all in benchmarks/results/"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument(
        "--pictures", type=Path, default=RESULTS, metavar="DIR", help="where pictures go"
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
    results = [one for one in results if one.get("kind") in ("named", "sweep")]
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


def pair(row: Row | None) -> str:
    """Kernel times with warm and with cold cache; a call where there is no GPU."""
    if row is None:
        return NOTHING
    if not row.get("warm"):
        return us(median(row, "call"))
    return f"{us(median(row, 'warm'))} / {us(median(row, 'cold'))}"


def speed_up(old: Row | None, new: Row | None) -> str:
    """How many times faster `new` is, by the times of `pair`."""
    if old is None or new is None:
        return NOTHING
    kinds = ("warm", "cold") if new.get("warm") and old.get("warm") else ("call",)
    factors = [(median(old, kind) or 0.0) / (median(new, kind) or 1.0) for kind in kinds]
    return " / ".join(f"**{factor:.1f}x**" for factor in factors)


def graph_replay(rows: Sequence[Row]) -> float | None:
    """Amortised replay of the fastest CUDA graph, in microseconds."""
    graphs = [row for row in rows if row["implementation"].endswith("-graph")]
    return min((t for row in graphs if (t := median(row, "amortised"))), default=None)


def summary_table(workloads: dict[str, tuple[Results, list[Row]]]) -> Table:
    """One line a workload: ours, the fastest PyTorch form, Iteration 4, the floor."""
    heads = [
        "workload",
        "ours, fastest",
        "time, warm / cold",
        "in one jit",
        "PyTorch, fastest",
        "time, warm / cold",
        "graph replay",
        "speed-up",
        "Iteration 4",
        "speed-up",
        "floor",
        "cold / floor",
    ]
    lines = []
    for name, (_, rows) in workloads.items():
        ours, torch = fastest(rows, "jax"), fastest(rows, "torch")
        last = iteration_4(rows)
        lines.append(
            [
                f"`{name}`",
                f"`{ours['implementation']}`" if ours else NOTHING,
                pair(ours),
                us(median(ours or {}, "in_jit")),
                f"`{torch['implementation']}`" if torch else NOTHING,
                pair(torch),
                us(graph_replay(rows)),
                speed_up(torch, ours),
                pair(last),
                speed_up(last, ours),
                us(ours["floor"]["us"]) if ours and ours.get("floor") else NOTHING,
                floor_ratio(ours or {}),
            ]
        )
    return without_empty_columns((heads, lines))


def detail_table(rows: Sequence[Row]) -> Table:
    """All that was measured of one workload."""
    heads = [
        "implementation",
        "kernels, cold",
        "kernels, warm",
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
                spread(row, "cold"),
                spread(row, "warm"),
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
    quick = ", few repetitions (`--quick`)" if one["quick"] else ""
    return (
        f"{about['device']}{driver}; {versions}, Python {about['python']}; "
        f"commit {commit[:12]}{dirty}; {one['time'][:10]}; "
        f"[{one['file']}](benchmarks/results/{one['file']}){quick}; `{one['command']}`"
    )


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
    used = list({one["file"]: one for one, _ in workloads.values()}.values())
    sweeps = [one for one in results if one["kind"] == "sweep"]
    lines = [
        "Microseconds, medians; all implementations interleaved in one process after their outputs "
        "were found right. " + (ABOUT_KERNELS if gpu else ABOUT_CALLS),
        "",
        markdown(summary_table(workloads)),
        "",
        *(f"- {provenance(one)}" for one in used),
        "",
    ]
    for link, caption in pictures:
        lines += [f"![{caption}]({link})", ""]
    if "seed" in workloads and named(workloads["seed"][1], ITERATION_4):
        lines += [
            "The four iterations of the original, as the document reports them (its GPU is not "
            "known) and as they run here: microseconds between CUDA events around a call, then of "
            "kernels.",
            "",
            markdown(seed_table(workloads["seed"][1])),
            "",
        ]
    for name, (_, rows) in workloads.items():
        lines += [
            f"<details><summary><code>{name}</code>: all implementations</summary>",
            "",
            markdown(detail_table(rows)),
            "",
            "Each row again:",
            "",
            "```",
            *(row["command"] for row in rows if row["status"] != "skipped"),
            "```",
            "",
            "</details>",
            "",
        ]
    if sweeps:
        lines += ["Sweeps:", "", *(f"- {provenance(one)}" for one in sweeps), ""]
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
    """Shows results, draws pictures and rewrites the README's section.

    Returns:
      0, or 1 if `--check` finds the README stale, or results cannot be compared.
    """
    files = arguments.files or sorted(RESULTS.glob("*.json"))
    try:
        results = load(files)
        if not results:
            print(f"no results yet: python -m benchmarks run writes them to {RESULTS}")
            return 0
        from benchmarks import plots

        wanted = plots.pictures(results)
        links = [
            (_relative(arguments.pictures / picture.file, arguments.readme), picture.caption)
            for picture in wanted
        ]
        old = arguments.readme.read_text()
        new = rewritten(old, section(results, links))
    except (OSError, ValueError) as error:
        print(f"report: {error}")
        return 1
    if arguments.check:
        missing = [p.file for p in wanted if not (arguments.pictures / p.file).is_file()]
        if new == old and not missing:
            print(f"{arguments.readme} is up to date")
            return 0
        if new != old:
            print(f"{arguments.readme} is stale")
        if missing:
            print(f"pictures are missing: {', '.join(missing)}")
        print("make it again: python -m benchmarks report")
        return 1
    for name, (_, rows) in by_workload(results).items():
        show(f"{name}, microseconds, median (p20..p80)", detail_table(rows))
    show("all workloads, microseconds", summary_table(by_workload(results)))
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    for picture in wanted:
        picture.draw(arguments.pictures / picture.file)
    arguments.readme.write_text(new)
    print(f"{arguments.readme} rewritten; {len(wanted)} pictures in {arguments.pictures}")
    return 0


def _relative(path: Path, readme: Path) -> str:
    try:
        return path.resolve().relative_to(readme.resolve().parent).as_posix()
    except ValueError:
        return path.as_posix()
