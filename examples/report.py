"""Writes results/REPORT.md, README.md's part of it and a picture: `python -m examples.report`."""

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.report import markdown, rewritten
from benchmarks.report import table as table_of
from benchmarks.results import Results, Row
from examples.evaluate import draw
from examples.options import BUDGET, NAMES
from examples.texts import TEXTS

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
PICTURE = RESULTS / "budgets.png"
DOCUMENT = RESULTS / "REPORT.md"
MORE = "Passkeys, drift, single layers, what a step is made of: [REPORT.md](results/REPORT.md)."
ABOUT_PROFILE = (
    "A step that decodes one token behind so many, with random weights; full attention is cuDNN's. "
    "*Copies* are of a layer's weights and caches out of arrays that hold those of all layers. "
    "Kernels are timed without CUDA graphs, a step with them, so its shares can be more than all."
)
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def load(folder: Path = RESULTS) -> list[Results]:
    """The results files of a folder, each with its name."""
    return [json.loads(x.read_text()) | {"file": x.name} for x in sorted(folder.glob("*.json"))]


def rows_of(results: Sequence[Results], measure: str) -> list[Row]:
    """All rows of a measurement, each with the tokens codebooks are from, and those decoded."""
    files = [one for one in results if one["measure"] == measure]
    about = ("prompt", "tokens")
    return [row | {x: one.get(x) for x in about} for one in files for row in one["rows"]]


def named_rows(results: Sequence[Results]) -> list[Row]:
    """Rows of named options, without those of configs."""
    return [row for row in rows_of(results, "options") if row["option"] in NAMES]


def named(option: str, full_layers: Sequence[int]) -> str:
    """An option in words, with the layers that are full."""
    return f"`{option}`" + f" (layer {', '.join(map(str, full_layers))} full)" * bool(full_layers)


def option_table(rows: Sequence[Row]) -> str:
    """Each option's scores at the usual budget, on each text."""
    found = {
        (x["option"], tuple(x.get("full_layers", ())), x["text"]): x
        for x in rows
        if x["budget"] == BUDGET
    }
    full = {layers for _, layers, _ in found}
    lines = []
    for name, layers in itertools.product(NAMES, sorted(full)):
        line: dict[str, str | None] = {"option": named(name, layers)}
        for text in TEXTS:
            row = found.get((name, layers, text))
            line[f"{text}: perplexity"] = row and f"{row['ratio']:.4f}x"
            line[f"KL, {text}"] = row and f"{row['divergence']:.4f}"
            line[f"same token, {text}"] = row and f"{row['agreement']:.1%}"
        if len(set(line.values()) - {None}) > 1:
            lines.append(line)
    return markdown(table_of(lines))


def about_needles(rows: Sequence[Row]) -> Iterator[str]:
    """How often each option finds the passkey."""
    found: dict[tuple[str, tuple[int, ...]], dict[float, bool]] = {}
    for row in rows:
        layers = () if row["option"] == "full" else tuple(row.get("full_layers", ()))
        found.setdefault((row["option"], layers), {})[row["depth"]] = row["found"]
    if found:
        each = (f"{named(*of)} {sum(x.values())} of {len(x)}" for of, x in sorted(found.items()))
        yield f"A passkey is found by {', '.join(each)}."


def about_drift(rows: Sequence[Row]) -> Iterator[str]:
    """What training again gains, by option and prompt."""
    pairs: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        pairs.setdefault((row["option"], row["prompt"]), []).append(row)
    for (name, prompt), both in sorted(pairs.items()):
        if len(both) == 2:
            without, again = sorted(both, key=lambda row: row["rebuilding"])
            yield (
                f"`{name}`, codebooks from the first {prompt} tokens: KL "
                f"{without['divergence']:.4f}; trained again where `rebuild_gain` says so, "
                f"{again['rebuilt']} times in all layers together, {again['divergence']:.4f}."
            )


def about_layers(rows: Sequence[Row]) -> Iterator[str]:
    """What layers with full attention gain."""
    for name in dict.fromkeys(row["option"] for row in rows):
        of_name = [row for row in rows if row["option"] == name]
        tokens = of_name[0]["tokens"]
        kl = {tuple(row["full_layers"]): row["divergence"] for row in of_name}
        best = min(kl, key=lambda layers: (len(layers) != 1, kl[layers]))
        full = {f"layer {best[0]} is, which gains most": best} if best else {}
        full |= {"the first is": (0,), "the first two are": (0, 1), "four": (0, 1, 2, 3)}
        said = ", ".join(f"{kl[x]:.4f} where {what}" for what, x in full.items() if x in kl)
        if () in kl and said:
            yield f"`{name}`, {tokens} tokens: KL {kl[()]:.4f} with no layer full, {said}."


def profile_table(rows: Sequence[Row]) -> str:
    """Speed, and what the kernels of a step are for."""
    lines = []
    for row in rows:
        us, wall = row["shares_us"], row["wall_us"]
        shares = {
            "matrices": us["matrices"],
            "attention": us["attention"],
            "copies": us["copies"],
            "the rest": us["sampling"] + us["other"],
            "no kernel": row["gaps_us"],
        }
        lines.append(
            {
                "a token of": f"`{row['case']}`, {row['option']}",
                "tokens/s": f"{row['tokens_a_second']:.0f}",
                "ms": f"{wall / 1e3:.2f}",
                **{head: f"{x / wall:.0%}" for head, x in shares.items()},
                "attention, us a layer": f"{row['attention_us_a_layer']:.1f}",
            }
        )
    return markdown(table_of(lines))


def provenance(results: Sequence[Results]) -> Iterator[str]:
    """What the files were measured on, a line for each machine and commit."""
    files: dict[str, list[str]] = {}
    for one in results:
        about = one["machine"]
        driver = f", driver {about['driver']}" if about["driver"] else ""
        commit = (one["commit"] or "not known")[:12] + " with changes" * bool(one["dirty"])
        versions = f"JAX {about['jax']}, Python {about['python']}, {one['dtype']}"
        where = f"{about['device']}{driver}; {versions}; commit {commit}; {one['time'][:10]}"
        files.setdefault(where, []).append(one["file"].removesuffix(".json"))
    return (f"{where}: {', '.join(names)}" for where, names in files.items())


def options_of(results: Sequence[Results]) -> list[str]:
    """The table of options."""
    named = named_rows(results)
    return [option_table(named)] if any(row["budget"] == BUDGET for row in named) else []


def section(results: Sequence[Results]) -> str:
    """The measured part of README.md, without its markers."""
    blocks = options_of(results)
    if swept(named_rows(results)):
        blocks.append(f"![KL and perplexity against the budget](results/{PICTURE.name})")
    if results:
        blocks.append(MORE)
    return "\n\n".join(blocks)


def document(results: Sequence[Results]) -> str:
    """All that the files say."""
    facts = [
        *about_needles(rows_of(results, "needles")),
        *about_drift(rows_of(results, "drift")),
        *about_layers(rows_of(results, "layers")),
    ]
    blocks = ["# What a real model loses, and what a step takes", *options_of(results)]
    blocks += ["\n".join(f"- {fact}" for fact in facts)] if facts else []
    if profiled := rows_of(results, "profile"):
        blocks += [profile_table(profiled), ABOUT_PROFILE]
    blocks += ["From the files beside this one, each with its command:"]
    blocks += ["\n".join(f"- {line}" for line in provenance(results))]
    return "\n\n".join(blocks) + "\n"


def swept(rows: Sequence[Row]) -> list[Row]:
    """Rows of options that were measured at several budgets, of the text where they were."""
    rows = [row for row in rows if "full_layers" not in row]
    budgets: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        budgets.setdefault((row["text"], row["option"]), set()).add(row["budget"])
    return [row for row in rows if len(budgets[row["text"], row["option"]]) > 1]


def main() -> int:
    results = load()
    README.write_text(rewritten(README.read_text(), section(results), BEGIN, END))
    DOCUMENT.write_text(document(results))
    if rows := swept(named_rows(results)):
        draw(rows, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
