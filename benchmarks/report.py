"""`python -m benchmarks report`: tables and pictures of results, and the README's section."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import (
    ITERATION_4,
    Results,
    build_table,
    by_workload,
    decode_table,
    detail_table,
    load,
    markdown,
    named,
    seed_table,
    show,
    summary_table,
)

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"

ABOUT_KERNELS = (
    "A step's kernel time in microseconds: medians of calls in a row, by CUPTI, all "
    "implementations in turns in one process after their outputs were found right. *p99*: of our "
    "calls, at least 100 of them, over the median. *Floor*: each candidate's codes read once at "
    "the measured copy bandwidth, or its look-ups at the measured rate, whichever takes longer, "
    "and one launch; a cache that holds the codes can help below it. The last two columns are "
    "wall-clock times: a step of ours in one `jit` of 20, and a replay of the fastest PyTorch form "
    "as a CUDA graph."
)
ABOUT_CALLS = "There was no GPU: times are wall-clock times of one call, in microseconds."
ABOUT_DETAILS = (
    "Kernel times with the data of the call before in the L2 cache (*warm*) and with an emptied "
    "one (*cold*), of programs compiled without command buffers, in which CUPTI misnames kernels; "
    "wall-clock times of a *call* with its wait, *amortised* over calls in a row, and between CUDA "
    "*events*, of programs as a user gets them. In brackets p20 to p80. What is slow was called "
    "fewer times."
)


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
    for one in [one for one in results if one["kind"] == "decode"][-1:]:
        lines += folded(
            "Decoding with cells: sealing",
            "Kernel times of a step in microseconds while all rows grow by a segment and more. The "
            "mean is over the steps of one segment, sealing included.",
            markdown(decode_table(one["rows"])),
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
    if arguments.files and arguments.check:
        arguments.parser.error("--check: expected no files, since it is about the README")
    try:
        if arguments.files:
            results = load(arguments.files)
        else:
            results = load(sorted(RESULTS.glob("*.json")), others=True)
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
        if one["kind"] == "decode":
            show("a decode, microseconds", decode_table(one["rows"]))
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
