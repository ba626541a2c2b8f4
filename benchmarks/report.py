"""Shows results; of the committed ones, writes REPORT.md, its pictures and the README's table."""

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import devices, frontier, host
from benchmarks.frontier import Evaluation
from benchmarks.results import (
    ROOT,
    Results,
    Row,
    command_of,
    framework_of,
    in_scan,
    is_indexer,
    load,
)
from parity.inputs import WORKLOADS

RESULTS = Path(__file__).parent / "results"
EVALUATIONS = ROOT / "examples/results"
README = ROOT / "README.md"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
QUALITY_BEGIN, QUALITY_END = "<!-- quality:begin -->", "<!-- quality:end -->"
IN_README = ("seed", "llama-32k", "llama-128k-b4", "wide", "million")
NOT_IN_README = (
    *("p99", "floor", "ours / floor", "in one jit", "graph replay"),
    *("ours by XLA", "its attention alone", "the original's alone"),
)
LAYERS_IN_README = ("llama-32k", "llama-128k-b4 --B 1", "llama-128k-b4", "wide", "million")
NOTHING = "-"

Table = tuple[list[str], list[list[str]]]  # heads, cells
Latest = dict[str, tuple[Results, list[Row]]]  # the run of each workload, and its rows there
Pictures = dict[str, tuple[str, Callable[[Path], None]]]  # file: caption, what draws it

# The document that this project comes from, "Iteration 4: Aggressive Multi-Front Optimization":
# milliseconds a call (mean, median, min, max, standard deviation; of two iterations the mean only),
# and microseconds of its kernels by what they are for. It does not name its GPU.
SEED_CALL_MS = {
    "iteration1": (0.955, None, None, None, None),
    "iteration2": (0.918, None, None, None, None),
    "iteration3": (0.796, 0.781, 0.757, 1.266, 0.073),
    "iteration4": (0.574, 0.530, 0.516, 1.274, 0.132),
}
SEED_KERNELS_US = {
    "iteration1": {"score": 568.3, "top-k": 66.7, "sort": 29.2},
    "iteration2": {"score": 568.4, "top-k": 66.3, "sort": 29.1},
    "iteration3": {"score": 70.8, "top-k": 65.9, "sort": 28.9, "index generation": 30.0},
    "iteration4": {"score": 69.5, "top-k": 65.8, "sort": 28.9, "index generation": 16.5},
}

ABOUT_README = "Median kernel times of a decode step in microseconds, outputs checked first"
ABOUT_KERNELS = (
    "A step's kernel time in microseconds: medians of calls in a row, by CUPTI, all "
    "implementations in turns in one process after their outputs were found right. *p99*: of our "
    "calls, at least 100 of them, over the median. *Floor*: each candidate's codes read once at "
    "the measured copy bandwidth, or its look-ups at the measured rate, whichever takes longer, "
    'and one launch; "cells" does not read them all, and may lie below it. The last two columns '
    "are wall-clock times: a step of ours among 20 in one `jit`, which uses up its lists there, "
    "and a replay of the fastest PyTorch form that was captured as a CUDA graph."
)
ABOUT_LAYERS = (
    "Median kernel times of a whole layer's decode step in microseconds, with an emptied L2 cache: "
    "keys and values written, tokens selected and attended to. Outputs were checked first"
)
ABOUT_FULL = (
    "*Full attention* is the fastest of `jax.nn.dot_product_attention` with cuDNN or XLA and "
    "`scaled_dot_product_attention`; the *original* is its indexer and its attention, eager."
)
ABOUT_SCANS = (
    "Microseconds a layer, many in one jit: by the wall clock, calls in a row, and of its kernels. "
    "`layers` are 32 stacked ones of one step, `steps` 64 steps of one layer. Full attention would "
    "copy a layer's cache out of a stack; *unrolled*, each layer has arrays of its own."
)
ABOUT_CALLS = "There was no GPU: times are wall-clock times of one call, in microseconds."
ABOUT_SEED = (
    "Microseconds of a call by the wall clock, its wait included, then of kernels. The document "
    "does not name its GPU."
)
ABOUT_BUILD = (
    "Milliseconds for all keys of a prompt; memory beside the keys; squared error of the codes' "
    "reconstruction, of normal keys. The original's k-means is beside it. With copies, these "
    "are trained on too, each key turned on as if it came later."
)
ABOUT_DECODE = (
    "Kernel times of a step in microseconds while all rows grow by a segment and more. The mean is "
    "over the steps of one segment, sealing included."
)
ABOUT_HOST = (
    "A layer of Llama 3 8B with a million tokens, one row, 128 heavy tokens: a decode step by the "
    "wall clock, in a scan over steps. How much of what it lists the steps before it listed is up "
    "to how much of a query the next one keeps; 92 to 99 % of a real model's lists were kept. "
    "The model has 16 such layers with random weights: all but its attention is measured alone."
)
ABOUT_QUALITY = (
    "Lists on a model's own keys, three layers of SmolLM2-135M over 8192 tokens, 64 sinks and a "
    "window of 64. Errors are those of the attention output, relative to full attention; recall is "
    "the share of the exact top-k that is selected."
)
FRONTIER_PICTURE = "frontier.png"
FRONTIER_SHAPE = 4, frontier.LENGTH
ABOUT_FRONTIER = (
    "What sparse attention in all layers of a model does to its predictions, KL(full, sparse), and "
    "what it takes: median kernel times of a whole layer's decode step at `llama-128k-b4` and for "
    "one row of it, with an emptied L2 cache. A config joins them; the model's context is shorter "
    "and has 64 sinks and a window of 64, the layer 128 of each, and how codebooks were trained "
    "and which dimensions they divide costs no time. Where a config was evaluated with several, "
    "its line is that of the recommended ones, or else of the best. By text, and how many tokens "
    "codebooks are of: *perplexity* is over full attention's, *same* how often the likeliest token "
    "is full attention's."
)
ABOUT_FRONTIER_LENGTHS = "The same for one row, against the tokens in the cache, in microseconds."
ABOUT_DETAILS = (
    "Kernel times with the data of the call before in the L2 cache (*warm*) and with an emptied "
    "one (*cold*), of programs compiled without command buffers, in which CUPTI misnames kernels; "
    "wall-clock times of a *call* with its wait, and *amortised* over calls in a row, of programs "
    "as a user gets them. In brackets p20 to p80. What is slow was called fewer times."
)


ABOUT_DEVICES = (
    "A whole layer's decode step in a scan, its rows, heads or tokens split over devices, beside "
    "one device with all of it and with one device's share: microseconds a step by the wall clock, "
    "with CUDA graphs and without, and those of kernels and of NCCL's, a device, without. Lists "
    "were held to those of one device first."
)
ABOUT_SERVING = (
    "A layer's decode step with several query tokens, and with caches in pages in random order: "
    "median kernel times in microseconds, with an emptied L2 cache, beside one token in rows, and "
    "beside as many tokens in rows. Outputs were checked first."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `report`."""
    parser.add_argument(
        "files", nargs="*", type=Path, help="results to show on the terminal, and no more"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; 1 if README.md or REPORT.md is stale, or a picture is missing",
    )


def report(arguments: argparse.Namespace) -> int:
    """Shows results; of the committed ones, also writes what is made of them.

    Returns:
      0, or 1 if `--check` finds something stale, or results cannot be compared.
    """
    if arguments.files and arguments.check:
        arguments.parser.error("--check: expected no files, since it is about the committed ones")
    try:
        found = load(arguments.files or sorted(RESULTS.glob("*.json")))
        if not found:
            print(f"no results in {RESULTS}; show those of a run: python -m benchmarks report FILE")
            return 0
        if arguments.files:
            show(found)
            return 0
        evaluations = frontier.read(EVALUATIONS)
        swept, of_frontier = pictures(found), frontier_picture(found, evaluations)
        wanted = swept | of_frontier
        blocks = frontier_blocks(found, evaluations, of_frontier)
        readme = rewritten(README.read_text(), readme_section(found))
        if of_frontier:
            recommended = [one for one in evaluations if one.names]
            section = markdown(recommended_table(found, recommended))
            readme = rewritten(readme, section, QUALITY_BEGIN, QUALITY_END)
        texts = {
            README: readme,
            RESULTS / "REPORT.md": document(found, swept, blocks),
        }
    except (OSError, ValueError) as error:
        print(f"report: {error}")
        return 1
    if arguments.check:
        problems = [
            f"{path} is stale"
            for path, text in texts.items()
            if not path.is_file() or path.read_text() != text
        ]
        problems += [f"{file} is missing" for file in wanted if not (RESULTS / file).is_file()]
        print("\n".join(problems) or "up to date")
        if problems:
            print("make it again: python -m benchmarks report")
        return 1 if problems else 0
    show(found)
    for path, text in texts.items():
        path.write_text(text)
        print(f"{path} written")
    for file, (_, draw) in wanted.items():
        draw(RESULTS / file)
        print(f"{RESULTS / file} drawn")
    return 0


# Which rows are compared


def latest(results: Sequence[Results], kind: str = "named") -> Latest:
    """For each workload the latest run of it: rows are compared within one run only.

    One that measured nothing of it, because it was skipped or interrupted, hides no earlier one.
    """
    found: Latest = {}
    for one in results:
        rows: dict[str, list[Row]] = {}
        for row in one["rows"] if one["kind"] == kind else ():
            if row.get("sweep"):
                continue
            rows.setdefault(row["workload"], []).append(row)
        for name, of_name in rows.items():
            if name not in found or any(row["status"] == "ok" for row in of_name):
                found[name] = one, of_name
    order = {name: place for place, name in enumerate(WORKLOADS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def of_kind(results: Sequence[Results], kind: str) -> list[Results]:
    """The latest results of a kind, if there are any."""
    return [one for one in results if one["kind"] == kind][-1:]


def layers_and_scans(results: Sequence[Results]) -> tuple[Latest, Latest]:
    """The latest runs of whole layers, and of scans through them."""
    found = latest(results, "layer")
    layers, scans = {}, {}
    for name, (one, rows) in found.items():
        (scans if in_scan(one, name) else layers)[name] = one, rows
    return layers, scans


def of_devices(results: Sequence[Results]) -> list[Results]:
    """The latest results for each number of devices, the fewest first."""
    found = {}
    for one in results:
        if one["kind"] == "devices" and one["rows"]:
            found[max(row["devices"] for row in one["rows"])] = one
    return [one for _, one in sorted(found.items())]


def swept(results: Sequence[Results]) -> list[Results]:
    """Results of sweeps along a size."""
    return [one for one in results if any(row.get("sweep") in AXES for row in one["rows"])]


def time_of(row: Row | None, cache: str = "warm") -> float | None:
    """What a row is compared by, in microseconds: its kernels; a call where there is no GPU."""
    if row is None or row["status"] != "ok":
        return None
    kernels = median(row, cache) or median(row, "cold")
    return kernels or (None if row.get("floor") else median(row, "call"))


def fastest(rows: Iterable[Row], framework: str) -> Row | None:
    """The fastest indexer of a framework, or None."""
    names = {row["implementation"]: row for row in rows if time_of(row) is not None}
    timed = [row for name, row in names.items() if is_indexer(name)]
    timed = [row for row in timed if framework_of(row["implementation"]) == framework]
    return min(timed, key=lambda row: time_of(row) or 0.0, default=None)


def named(rows: Iterable[Row], *implementations: str) -> Row | None:
    """The timed row of the first of these implementations that has one, or None."""
    timed = {row["implementation"]: row for row in rows if time_of(row) is not None}
    return next((timed[name] for name in implementations if name in timed), None)


# Tables


def table(lines: Sequence[dict[str, str | None]]) -> Table:
    """Heads and cells of lines that all have the same heads, without columns of nothing."""
    heads = [
        head
        for place, head in enumerate(lines[0] if lines else ())
        if place == 0 or any(line[head] for line in lines)
    ]
    return heads, [[line[head] or NOTHING for head in heads] for line in lines]


def us(value: float | None) -> str | None:
    """Microseconds, or another unit, with three figures."""
    if value is None:
        return None
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def median(row: Row, kind: str) -> float | None:
    """Median of one kind of time, or None."""
    return row[kind]["median"] if row.get(kind) else None


def spread(row: Row, kind: str) -> str | None:
    """Median and the range from p20 to p80."""
    times = row.get(kind)
    return times and f"{us(times['median'])} ({us(times['p20'])}..{us(times['p80'])})"


def tail(row: Row) -> str | None:
    """How far the slowest hundredth of warm calls is from the median."""
    times = row.get("warm")
    return f"{times['p99'] / times['median']:.2f}" if times and times["count"] >= 100 else None


def ratio(one: float | None, other: float | None, mark: str = "", digits: int = 1) -> str | None:
    """How many times `other` goes into `one`."""
    return f"{mark}{one / other:.{digits}f}x{mark}" if one and other else None


def mebibytes(row: Row) -> str | None:
    """Memory that a call needs beside its inputs."""
    memory = row.get("memory_bytes")
    return None if memory is None else f"{memory / 2**20:.1f}"


def short(row: Row | None, cache: str = "warm") -> str | None:
    """The time of an implementation, and its name without the framework."""
    return row and f"{us(time_of(row, cache))} `{row['implementation'].partition(':')[2]}`"


def measured(row: Row) -> tuple[Row, str | None]:
    """What a table shows of a row: its numbers, if it went well, and a note."""
    reason = row.get("reason")
    return (row, reason) if row["status"] == "ok" else ({}, f"{row['status']}: {reason}")


def sizes(workload: str, shape: dict[str, Any]) -> str:
    """A workload's name, with a few words for its sizes."""
    lengths = shape["L"] if isinstance(shape["L"], list) else [shape["L"]]
    tokens = "..".join(dict.fromkeys(tokens_of(x) for x in (min(lengths), max(lengths))))
    words = [f"{shape['B']} row{'s' * (shape['B'] > 1)}", f"{tokens} tokens"]
    if shape["config"]["heavy_size"] != 128:
        words.append(f"budget {shape['config']['heavy_size']}")
    if shape["weights"]:
        words.append("dense weights")
    words += [f"{shape[many]} {many}" for many in ("layers", "steps") if (shape.get(many) or 1) > 1]
    return f"`{workload}`: {', '.join(words)}"


def tokens_of(count: int) -> str:
    """A number of tokens, in units of 2**10 or 2**20 where it is a multiple of them."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{letter}"
    return str(count)


def summary(workloads: Latest, names: Iterable[str]) -> list[dict[str, str | None]]:
    """A line a workload: ours, Iteration 4, the fastest PyTorch form, the floor."""
    lines = []
    for name in names:
        one, rows = workloads.get(name, (None, []))
        ours, torch = fastest(rows, "jax"), fastest(rows, "torch")
        last = named(rows, "torch:iteration4", "torch:iteration4-graph")
        time, least = time_of(ours), (ours or {}).get("floor", {}).get("us")
        graphs = [row for row in rows if row["implementation"].endswith("-graph")]
        replays = [x for row in graphs if (x := median(row, "amortised"))]
        lines.append(
            {
                "workload": sizes(name, one["workloads"][name]) if one else f"`{name}`",
                "ours": short(ours),
                "p99": tail(ours or {}),
                "Iteration 4": us(time_of(last)),
                "speed-up": ratio(time_of(last), time, "**"),
                "fastest PyTorch form": short(torch),
                "speed-up over it": ratio(time_of(torch), time, "**"),
                "floor": us(least),
                "ours / floor": ratio(time, least),
                "in one jit": us(median(ours or {}, "in_jit")),
                "graph replay": us(min(replays, default=None)),
            }
        )
    return lines


def layer_summary(workloads: Latest, names: Iterable[str]) -> list[dict[str, str | None]]:
    """A line a workload: full attention, the original, ours, and attention to given lists."""
    lines = []
    for name in names:
        one, rows = workloads.get(name, (None, []))
        timed = {row["implementation"]: row for row in rows if time_of(row) is not None}

        def of(*prefixes: str, timed: dict[str, Row] = timed) -> Row | None:
            found = [row for name, row in timed.items() if name.startswith(prefixes)]
            return min(found, key=lambda row: time_of(row, "cold") or 0.0, default=None)

        whole, original = of("jax:full", "torch:sdpa"), of("torch:original")
        ours = of("jax:cells", "jax:threshold") or of("jax:xla")
        times = [time_of(row, "cold") for row in (whole, original, ours)]
        lines.append(
            {
                "workload": sizes(name, one["workloads"][name]) if one else f"`{name}`",
                "full attention": short(whole, "cold"),
                "the original": us(times[1]),
                "ours": short(ours, "cold"),
                "speed-up over full": ratio(times[0], times[2], "**"),
                "over the original": ratio(times[1], times[2], "**"),
                "ours by XLA": us(time_of(of("jax:xla"), "cold")),
                "its attention alone": us(time_of(of("jax.sparse"), "cold")),
                "the original's alone": us(time_of(of("torch.sparse"), "cold")),
            }
        )
    return lines


def scan_table(workloads: Latest) -> Table:
    """Times a layer in scans, in microseconds."""
    lines = []
    for name, (one, rows) in workloads.items():
        shape = one["workloads"][name]
        count = shape["layers"] or shape["steps"]
        for full in rows:
            row, note = measured(full)
            wall, kernels = median(row, "amortised"), median(row, "warm")
            launches = row.get("launches")
            lines.append(
                {
                    "workload": sizes(name, shape),
                    "implementation": f"`{full['implementation']}`",
                    "wall clock": us(wall and wall / count),
                    "kernels": us(kernels and kernels / count),
                    "launches": launches and f"{launches / count:.1f}",
                    "note": note,
                }
            )
    return table(lines)


def detail_table(rows: Sequence[Row]) -> Table:
    """All that was measured of one workload, in microseconds."""
    lines = []
    for full in rows:
        row, note = measured(full)
        floor = row.get("floor", {}).get("us")
        stages = row.get("stages", {})
        lines.append(
            {
                "implementation": f"`{full['implementation']}`",
                "kernels, warm": spread(row, "warm"),
                "p99": tail(row),
                "calls": str(row["warm"]["count"]) if row.get("warm") else None,
                # Cold: data that are warm need not come from memory, so may beat the floor.
                "kernels, cold": spread(row, "cold"),
                "floor": us(floor),
                "cold / floor": ratio(median(row, "cold"), floor),
                "launches": str(row["launches"]) if "launches" in row else None,
                "by stage": "; ".join(f"{name} {us(time)}" for name, time in stages.items()),
                "a call": spread(row, "call"),
                "amortised": us(median(row, "amortised")),
                "in one jit": us(median(row, "in_jit")),
                "MiB": mebibytes(row),
                "compile, s": us(row.get("compile_seconds")),
                "form": row.get("form"),
                "note": note,
            }
        )
    return table(lines)


def seed_table(rows: Sequence[Row]) -> Table:
    """The seed document's figures of its iterations next to ours."""
    lines = []
    for iteration, wall in SEED_CALL_MS.items():
        statistics = ("mean", "median", "min", "max", "std")
        kernels = ("score", "top-k", "sort", "index generation")
        row = named(rows, f"torch:{iteration}") or {}
        for whose, call, stages in (
            (
                "the document's",
                {name: ms and ms * 1e3 for name, ms in zip(statistics, wall, strict=True)},
                SEED_KERNELS_US[iteration],
            ),
            ("here", row.get("call", {}), row.get("stages", {})),
        ):
            other = [time for stage, time in stages.items() if stage not in kernels]
            lines.append(
                {"": f"Iteration {iteration[-1]}, {whose}"}
                | {f"call, {name}": us(call.get(name)) for name in statistics}
                | {stage: us(stages.get(stage)) for stage in kernels}
                | {"other": us(sum(other)) if other else None}
                | {"all kernels": us(median(row, "warm")) if whose == "here" else None}
            )
    return table(lines)


def build_table(rows: Sequence[Row]) -> Table:
    """What was measured of build_index, in milliseconds and MiB."""
    lines = []
    for full in rows:
        row, note = measured(full)
        kernels, call, memory = median(row, "warm"), median(row, "call"), row.get("memory_bytes")
        lines.append(
            {
                "workload": f"`{full['workload']}`",
                "implementation": f"`{full['implementation']}`",
                "kernels": us(kernels and kernels / 1e3),
                "a build": us(call and call / 1e3),
                "launches": str(row["launches"]) if "launches" in row else None,
                "MiB": mebibytes(row),
                "of the keys": f"{memory / row['key_bytes']:.2f}x" if memory else None,
                "error": us(row.get("error")),
                "note": note,
            }
        )
    return table(lines)


def decode_table(rows: Sequence[Row]) -> Table:
    """Steps of a decode, in microseconds."""
    lines = []
    for full in rows:
        row, note = measured(full)
        times = row.get("warm", {})
        lines.append(
            {
                "workload": f"`{full['workload']}`",
                "steps": str(row["steps"]) if row else None,
                "segment": str(row["segment"]) if row else None,
                "median": us(times.get("median")),
                "mean": us(row.get("mean_of_a_segment")),
                "p99": us(times.get("p99")),
                "max": us(times.get("max")),
                "max / median": ratio(times.get("max"), times.get("median")),
                "note": note,
            }
        )
    return table(lines)


def devices_table(rows: Sequence[Row]) -> Table:
    """A line for each layer and way to split it: kernels, exchanges and the wall clock a step."""

    def line(row: Row) -> dict[str, str | None]:
        memory = row.get("bytes_a_device")
        return {
            "layer": f"{row['rows']} x {row['tokens']}",
            "on": row["case"],
            "wall clock": us(row.get("wall_us")),
            "without graphs": us(row.get("wall_us_without_graphs")),
            "kernels": us(row.get("kernel_us")),
            "NCCL": us(row.get("nccl_us")),
            "GiB a device": None if memory is None else f"{memory / 2**30:.2f}",
            "note": row.get("reason") or ("lists checked" if row.get("checked") else row["what"]),
        }

    return table([line(row) for row in rows])


def of_serving(results: Sequence[Results]) -> list[Results]:
    """The latest results with several query tokens and pages, if there are any."""
    return [one for one in results if any(x.get("sweep") == "serving" for x in one["rows"])][-1:]


def serving_table(one: Results) -> Table:
    """A line for each number of query tokens, selector, and size of pages."""
    times: dict[tuple[str, int, str], float | None] = {}
    for row in one["rows"]:
        tokens = one["workloads"][row["workload"]]["T"]
        selector, _, pages = row["implementation"].partition(":")[2].partition("-pages-")
        times[selector, tokens, pages] = time_of(row, "cold")
    lines = []
    for (selector, tokens, pages), found in times.items():
        in_rows = times.get((selector, tokens, "")) if pages else None
        lines.append(
            {
                "selector": f"`{selector}`",
                "query tokens": str(tokens),
                "cache": f"pages of {pages}" if pages else "rows",
                "kernels": us(found),
                "of one token": ratio(found, times.get((selector, 1, "")), digits=2),
                "of rows": ratio(found, in_rows, digits=2),
            }
        )
    return table(lines)


def host_table(rows: Sequence[Row]) -> Table:
    """Caches in host memory and beside them, in microseconds."""
    lines = []
    for row in rows:
        lines.append(
            {
                "of": row["workload"],
                "what": row["implementation"],
                "a query keeps": f"{row['keeps']:g}" if "keeps" in row else None,
                "a step": us(median(row, "call")),
                "its attention": us(row.get("attention_us")),
                "new rows a step": f"{row['new_rows']:.0f}" if "new_rows" in row else None,
                "temporaries, MB": megabytes(row.get("temp_bytes")),
                "device's peak, GB": megabytes(row.get("device_peak_bytes"), 1e9),
            }
        )
    return table(lines)


def megabytes(value: float | None, unit: float = 1e6) -> str | None:
    """A number of bytes, or None."""
    return None if value is None else f"{value / unit:.1f}"


def frontier_table(results: Sequence[Results], evaluations: Sequence[Evaluation]) -> Table:
    """A line a config: its times, and what a model says on each text."""
    times = frontier.times_of(results)
    of_one, of_four = (times.get((B, frontier.LENGTH), {}) for B in (1, 4))
    lines = []
    for config in frontier.in_order(filter(None, of_four | of_one)):
        rows = [(one.text, one.rows.get(config, {})) for one in evaluations]
        names = dict.fromkeys(one.names.get(config, "") for one in evaluations)
        lines.append(
            {
                "codes": config.codes,
                "budget": str(config.heavy_size),
                "rerank": str(config.rerank),
                "rest": str(config.estimate_rest or "no"),
                "4 rows, us": us(of_four.get(config)),
                "1 row, us": us(of_one.get(config)),
            }
            | of_texts(rows)
            | {"recommended": " ".join(filter(None, names))}
        )
    for budget in sorted({budget for one in evaluations for budget in one.exact}):
        rows = [(one.text, one.exact.get(budget, {})) for one in evaluations]
        lines.append({"codes": "exact top-k", "budget": str(budget)} | of_texts(rows))
    full = {"4 rows, us": us(of_four.get(None)), "1 row, us": us(of_one.get(None))}
    lines.append({"codes": "full attention"} | full)
    return table([dict.fromkeys(lines[0]) | line for line in lines])


def recommended_table(results: Sequence[Results], evaluations: Sequence[Evaluation]) -> Table:
    """The README's: divergence and times of the recommended configs, exact top-k and full."""
    times = frontier.times_of(results)
    rows: dict[str, Any] = {f"`{name}`": None for name in frontier.RECOMMENDED}
    for one in evaluations:
        rows |= {f"`{name}`": config for config, name in one.names.items()}
    budget = frontier.PLAIN.heavy_size
    lines = []
    for name, config in (rows | {f"exact top-k of {budget}": None, "full attention": None}).items():
        line: dict[str, str | None] = {"": name}
        for one in evaluations:
            row = one.exact.get(budget) if name.startswith("exact") else one.rows.get(config)
            line[f"KL, {one.text}"] = format(row["divergence"], ".2g") if row else None
        timed = config or name == "full attention"
        for head, B in (("4 rows, µs", 4), ("1 row, µs", 1)):
            line[head] = us(times.get((B, frontier.LENGTH), {}).get(config)) if timed else None
        lines.append(line)
    return table(lines)


def of_texts(rows: Iterable[tuple[str, Row]]) -> dict[str, str | None]:
    """What a model says, by text."""
    forms = {
        "KL": ("divergence", ".2g"),
        "perplexity": ("ratio", ".3f"),
        "same": ("agreement", ".3f"),
    }
    return {
        f"{head}: {text}": format(row[name], form) if row else None
        for text, row in rows
        for head, (name, form) in forms.items()
    }


def frontier_lengths(results: Sequence[Results]) -> Table:
    """Times of one row against its length, of the configs that have several."""
    times = {L: found for (B, L), found in frontier.times_of(results).items() if B == 1}
    configs = [config for found in times.values() for config in found if config]
    several = frontier.in_order(x for x in set(configs) if configs.count(x) > 1)
    return table(
        [
            {"rerank": str(config.rerank), "rest": str(config.estimate_rest or "no")}
            | {tokens_of(L): us(times[L].get(config)) for L in sorted(times)}
            for config in several
        ]
    )


def quality_tables(rows: Sequence[Row]) -> dict[str, Table]:
    """The tables of a quality run by name, figures as they are."""
    tables: dict[str, list[dict[str, str | None]]] = {}
    for row in rows:
        line = {
            name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in row.items()
            if name != "table"
        }
        tables.setdefault(row["table"], []).append(line)
    return {name: table(lines) for name, lines in tables.items()}


# Where they go


def all_tables(results: Sequence[Results]) -> dict[str, Table]:
    """The tables that results have, by title."""
    workloads = latest(results)
    tables = {
        f"{name}, microseconds, median (p20..p80)": detail_table(rows)
        for name, (_, rows) in workloads.items()
    }
    layers, scans = layers_and_scans(results)
    for name, (_, rows) in (layers | scans).items():
        tables[f"layer: {name}, microseconds, median (p20..p80)"] = detail_table(rows)
    for one in {one["kind"]: one for one in swept(results)}.values():
        for name in dict.fromkeys(row["workload"] for row in one["rows"]):
            rows = [row for row in one["rows"] if row["workload"] == name]
            tables[f"{name}, microseconds"] = detail_table(rows)
    for one in of_serving(results):
        tables["several query tokens and pages, microseconds"] = serving_table(one)
    if frontier.swept(results):
        tables["frontier, microseconds"] = frontier_table(results, ())
    if workloads:
        tables["all workloads, microseconds"] = table(summary(workloads, workloads))
    if layers:
        tables["whole layers, microseconds"] = table(layer_summary(layers, layers))
    if scans:
        tables["a layer in a scan, microseconds"] = scan_table(scans)
    for one in of_kind(results, "build"):
        tables["build_index, milliseconds"] = build_table(one["rows"])
    for one in of_kind(results, "decode"):
        tables["a decode, microseconds"] = decode_table(one["rows"])
    for one in of_devices(results):
        most = max(row["devices"] for row in one["rows"])
        tables[f"up to {most} devices, microseconds"] = devices_table(one["rows"])
    for one in of_kind(results, "host"):
        tables["caches in host memory, microseconds"] = host_table(one["rows"])
    for one in of_kind(results, "quality"):
        tables |= quality_tables(one["rows"])
    return tables


def show(results: Sequence[Results]) -> None:
    """Prints all tables to the terminal; as Markdown where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        for title, found in all_tables(results).items():
            print(f"\n{title}\n{markdown(found)}")
        return
    console = Console()
    if not console.is_terminal:
        console.width = 240  # A log has no width to keep to.
    for title, (heads, lines) in all_tables(results).items():
        shown = RichTable(title=title, title_justify="left")
        for number, head in enumerate(heads):
            at_side = number == 0 or head in ("note", "by stage")
            shown.add_column(head, justify="left" if at_side else "right", overflow="fold")
        for line in lines:
            shown.add_row(*(Text(cell.replace("`", "").replace("**", "")) for cell in line))
        console.print(shown)


def markdown(found: Table) -> str:
    """A table in Markdown."""
    heads, lines = found
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in r) + " |" for r in rows)


def provenance(one: Results, folder: str = "") -> str:
    """Where numbers come from, in a line; the link to them starts with a folder."""
    about = one["machine"]
    driver = f", driver {about['driver']}" if about["driver"] else ""
    versions = ", ".join(
        f"{label} {about[name]}"
        for label, name in (("JAX", "jax"), ("PyTorch", "torch"), ("Triton", "triton"))
        if about[name]
    )
    commit = (one["commit"] or "not known")[:12] + " with changes" * bool(one["dirty"])
    quick = ", few repetitions" * one["quick"]
    return (
        f"`{one['command']}`, {one['seconds']:.0f} s{quick}: {about['device']}{driver}; "
        f"{versions}, Python {about['python']}; commit {commit}; {one['time'][:10]}; "
        f"[{one['file']}]({folder}{one['file']})"
    )


def readme_section(results: Sequence[Results]) -> str:
    """The README's section, without its markers: one table, and where it comes from.

    It is about whole layers, or about selection where no layer was measured.
    """
    layers, _ = layers_and_scans(results)
    if any(name in layers for name in LAYERS_IN_README):
        workloads, names, about = layers, LAYERS_IN_README, ABOUT_LAYERS
        lines = layer_summary(workloads, names)
    else:
        workloads, names, about = latest(results), IN_README, ABOUT_README
        lines = summary(workloads, names)
    lines = [{head: line[head] for head in line if head not in NOT_IN_README} for line in lines]
    used = {one["file"]: one for name, (one, _) in workloads.items() if name in names}
    sources = [f"- {provenance(one, 'benchmarks/results/')}" for one in used.values()]
    return "\n\n".join([markdown(table(lines)), f"{about}:", "\n".join(sources)])


def rewritten(readme: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """A README with the section between its markers replaced.

    Raises:
      ValueError: if the markers are not there once each, in order.
    """
    before, found, rest = readme.partition(begin)
    _, found_too, after = rest.partition(end)
    if not found or not found_too or any(mark in before + after for mark in (begin, end)):
        raise ValueError(f"expected {begin} and {end} in README.md, once each")
    return f"{before}{begin}\n{section}\n{end}{after}"


def commands(one: Results, rows: Iterable[Row]) -> str:
    """A block with the command of each row that was tried."""
    tried = [row for row in rows if row["status"] != "skipped"]
    names = [(one["kind"], row["workload"], row["implementation"]) for row in tried]
    return "\n".join(["```", *dict.fromkeys(command_of(*name) for name in names), "```"])


def frontier_blocks(
    results: Sequence[Results], evaluations: Sequence[Evaluation], picture: Pictures
) -> list[str]:
    """The report's section on quality against time, if that was measured."""
    if not (found := frontier.swept(results)):
        return []
    shown = [f"![{caption}]({file})" for file, (caption, _) in picture.items()]
    tables = [markdown(frontier_table(results, evaluations))]
    if (lengths := frontier_lengths(results))[1]:
        tables += [ABOUT_FRONTIER_LENGTHS, markdown(lengths)]
    tables += map(provenance, found)
    files = {x["file"]: x for one in evaluations for x in one.files}
    of_model = [provenance(x, "../../examples/results/") for x in files.values()]
    return ["## Quality against time", ABOUT_FRONTIER, *shown, *tables, *of_model]


def document(
    results: Sequence[Results], pictures: Pictures, of_frontier: Sequence[str] = ()
) -> str:
    """REPORT.md: everything that was measured, and the commands."""
    workloads = latest(results)
    gpu = any(one["machine"]["gpu"] for one in results)
    used = {one["file"]: one for one, _ in workloads.values()}
    blocks = ["# What was measured", "`python -m benchmarks report` makes this of the files here."]
    layers, scans = layers_and_scans(results)
    for title, about, found, made in (
        (
            "Whole layers",
            f"{ABOUT_LAYERS}. {ABOUT_FULL}",
            layers,
            table(layer_summary(layers, layers)),
        ),
        ("Layers in scans", ABOUT_SCANS, scans, scan_table(scans)),
    ):
        if found:
            blocks += [f"## {title}", about, markdown(made)]
            blocks += map(provenance, {one["file"]: one for one, _ in found.values()}.values())
    for one in of_serving(results):
        blocks += ["## Several query tokens, and pages", ABOUT_SERVING]
        blocks += [markdown(serving_table(one)), provenance(one)]
    blocks += of_frontier
    if workloads:
        blocks += ["## Selection in a decode step", ABOUT_KERNELS if gpu else ABOUT_CALLS]
        blocks += [markdown(table(summary(workloads, workloads))), *map(provenance, used.values())]
    for file, (caption, _) in pictures.items():
        blocks += [f"![{caption}]({file})"]
    blocks += map(provenance, swept(results))
    if "seed" in workloads and named(workloads["seed"][1], "torch:iteration4"):
        blocks += ["## The four iterations of the original, as reported and here", ABOUT_SEED]
        blocks += [markdown(seed_table(workloads["seed"][1]))]
    for kind, title, about, make in (
        ("build", "Building an index", ABOUT_BUILD, build_table),
        ("decode", "Decoding with cells: sealing", ABOUT_DECODE, decode_table),
    ):
        for one in of_kind(results, kind):
            blocks += [f"## {title}", about, markdown(make(one["rows"])), provenance(one)]
            blocks += [commands(one, one["rows"])]
    blocks += ["## Several devices", ABOUT_DEVICES] if of_devices(results) else []
    for one in of_devices(results):
        blocks += [markdown(devices_table(one["rows"])), provenance(one)]
    for one in of_kind(results, "host"):
        blocks += ["## Caches in host memory", ABOUT_HOST, markdown(host_table(one["rows"]))]
        blocks += [provenance(one)]
    for one in of_kind(results, "quality"):
        blocks += ["## Quality of lists", ABOUT_QUALITY, provenance(one)]
        for name, found in quality_tables(one["rows"]).items():
            blocks += [f"### {name}", markdown(found)]
    blocks += ["## Decode steps in detail", ABOUT_DETAILS] if (workloads or layers) and gpu else []
    for what, found in (("", workloads), ("A whole layer: ", layers), ("A scan: ", scans)):
        for name, (one, rows) in found.items():
            title = f"{what}{sizes(name, one['workloads'][name])}"
            blocks += [f"### {title}", markdown(detail_table(rows)), commands(one, rows)]
    return "\n\n".join(blocks) + "\n"


# Pictures

# Okabe and Ito's colours, which stay apart for the colour-blind, each with a marker of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"

# Of a sweep: its picture, the label of its axis, and the size along it.
AXES = {
    "length": ("time-against-length", "tokens in the cache, L", lambda shape: shape["L"]),
    "batch": ("time-against-batch", "batch rows, B", lambda shape: shape["B"]),
    "layer": ("layer-against-length", "tokens in the cache, L", lambda shape: shape["L"]),
    "subspaces": (
        "time-against-subspaces",
        "look-ups a key, M, and bits a code",
        lambda shape: (shape["config"]["num_subspaces"], shape["config"]["num_bits"]),
    ),
}


def pictures(results: Sequence[Results]) -> Pictures:
    """What can be drawn of the sweeps among results; nothing is drawn yet."""
    found = {}
    for one in results:
        for sweep, (file, label, _) in AXES.items():
            rows = [row for row in one["rows"] if row.get("sweep") == sweep]
            if rows := [row for row in rows if time_of(row) is not None]:
                draw = functools.partial(draw_sweep, rows, one["workloads"], sweep)
                what = "a whole layer" if sweep == "layer" else "a step"
                found[f"{file}.png"] = f"Time of {what} against {label}", draw
    for one in of_devices(results)[-1:]:
        draw = functools.partial(devices.draw, one["rows"])
        found[devices.PICTURE] = "Time of a whole layer against devices", draw
    for one in of_kind(results, "host"):
        draw = functools.partial(host.draw, one["rows"])
        found[host.PICTURE] = "Time of a layer in host memory against what is kept", draw
    return found


def frontier_picture(results: Sequence[Results], evaluations: Sequence[Evaluation]) -> Pictures:
    """Quality against time, if both were measured."""
    times = frontier.times_of(results)
    there = [one for one in evaluations if frontier.points(times, one, FRONTIER_SHAPE)]
    if not there:
        return {}
    draw = functools.partial(frontier.draw, times, there, FRONTIER_SHAPE)
    return {FRONTIER_PICTURE: ("Divergence of a model against the time of a layer", draw)}


def draw_sweep(rows: Sequence[Row], shapes: dict[str, Any], sweep: str, path: Path) -> None:
    """Median time of each implementation against a size, and the floor."""
    # Not pyplot: it keeps figures in a global list and asks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    _, label, size_of = AXES[sweep]
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    of_rows = [size_of(shapes[row["workload"]]) for row in rows]
    all_sizes = sorted(set(of_rows))
    # Pairs of M and bits have no scale: they stand side by side.
    pairs = sweep == "subspaces"
    places = [all_sizes.index(size) if pairs else size for size in of_rows]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines: dict[tuple[str, int | None], list[tuple[Any, float | None]]] = {}
    for place, row in zip(places, rows, strict=True):
        batch = shapes[row["workload"]]["B"] if sweep == "layer" else None
        lines.setdefault((row["implementation"], batch), []).append((place, time_of(row)))
    for (name, batch), points in lines.items():
        number = names.index(name)
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        look |= {"label": f"{name}, B={batch}" if batch else name}
        look |= {"linestyle": "--" if batch and batch > 1 else "-", "markersize": 5}
        ax.plot(*zip(*sorted(points), strict=True), **look)
    floors = {
        place: row["floor"]["us"]
        for place, row in zip(places, rows, strict=True)
        if row.get("floor") and is_indexer(row["implementation"])
    }
    if floors:
        ax.plot(*zip(*sorted(floors.items()), strict=True), "k:", label="floor")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    if pairs:
        ax.set_xticks(range(len(all_sizes)), [f"M={m}\n{bits} bits" for m, bits in all_sizes])
    else:
        ax.set_xscale("log", base=2)
        ax.set_xticks(all_sizes, [tokens_of(size) for size in all_sizes])
        ax.minorticks_off()
    ax.set_xlabel(label)
    found = next((kind for kind in ("warm", "cold") if rows[0].get(kind)), None)
    what = f"kernel time, {found} L2" if found else "wall-clock time a call"
    ax.set_ylabel(f"{what}, µs")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    # Without a date, so that the same results give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
