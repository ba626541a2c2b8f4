"""Measures what sparse attention does to a model's predictions: `python -m examples.evaluate`.

A text is read with full attention, and its last tokens are decoded, each followed by the text's own
next one, with each option: perplexity, divergence from full attention, and agreement with it.
"""

import argparse
import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.results import (
    describe_machine,
    find_commit,
    has_gpu,
    output_path,
    repeatable,
    write,
)
from examples.model import Model, read_prompts
from examples.options import BUDGET, NAMES, Option, check_layers, named, options, plain
from examples.scoring import (
    BLOCK,
    Reading,
    predict,
    prepared,
    read,
    score,
    tokens_a_step,
)
from examples.texts import PASSKEY, TEXTS, haystacks, tokens_of
from examples.weights import MODELS, Loaded, load
from jax_indexer import Rope, empty_cache
from jax_indexer.config import MOST_CELLS
from jax_indexer.rope import MOST_COPIES
from parity.real_keys import Failure

DEPTHS = 10
ANSWER = 8  # tokens in which a passkey must be said
ABOUT = ("measure", "model", "length", "tokens", "prompt")  # of arguments, for the file
# Of a config, for a row; `--config` takes these and `copies`.
FIELDS = (
    *("num_subspaces", "num_bits", "grouping", "heavy_size", "sink_size", "window_size"),
    *("rerank", "estimate_rest"),
)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured, and with what.

    Attributes:
      loaded: the model.
      options: what is measured: names, budgets, and how to attend.
      prompt: how many tokens codebooks are trained on.
      full_layers: layers with full attention, where the measurement does not choose them.
      advance: called with what is done next, before it is.
    """

    loaded: Loaded
    options: Sequence[tuple[str, int, Option]]
    prompt: int
    full_layers: Sequence[int]
    advance: Callable[[str], None]

    @property
    def where_full(self) -> dict[str, Any]:
        """Of a row: which layers are full, if any are."""
        return {"full_layers": list(self.full_layers)} if self.full_layers else {}

    def score(self, reading: Reading, name: str, budget: int, option: Option, **how: Any) -> Row:
        """A row of the results; `how` as `examples.scoring.score` takes it."""
        self.advance(", ".join([name, f"budget {budget}", *(f"{k} {v}" for k, v in how.items())]))
        began = time.perf_counter()
        model = self.loaded.model
        found = score(self.loaded.parameters, model, reading, option, self.prompt, **how)
        seconds = round(time.perf_counter() - began, 1)
        ahead = option.ahead(model.rope, self.prompt, len(reading.tokens) - self.prompt)
        config = {x: getattr(option.config, x) for x in FIELDS} | {"copies": ahead.get("copies", 0)}
        about = {"option": name, "budget": budget, **how}
        return {**about, **found, "seconds": seconds, "config": config}


def by_option(work: Work, reading: Reading) -> Iterator[Row]:
    """Each option at each budget."""
    for chosen in work.options:
        yield work.score(reading, *chosen, **work.where_full)


def by_layer(work: Work, reading: Reading) -> Iterator[Row]:
    """With full attention in no layer, in one of them, and in the first few."""
    one = [[i] for i in range(work.loaded.model.layers)]
    for chosen in work.options:
        for layers in ([], *one, [0, 1], [0, 1, 2, 3]):
            yield work.score(reading, *chosen, full_layers=layers)


def by_drift(work: Work, reading: Reading) -> Iterator[Row]:
    """With the prompt's codebooks, and with those trained anew where `rebuild_gain` says so."""
    for chosen in work.options:
        for rebuilding in (False, True):
            yield work.score(reading, *chosen, rebuilding=rebuilding, **work.where_full)


def by_needle(work: Work, filler: np.ndarray) -> Iterator[Row]:
    """Whether a passkey is found at each depth, with full attention and with each option."""
    model, parameters, tokenizer, _ = work.loaded
    S = len(filler)
    is_full = np.isin(np.arange(model.layers), work.full_layers) if work.full_layers else None
    for depth, tokens in haystacks(filler[: S - ANSWER], DEPTHS, tokenizer):
        work.advance(f"passkey at {depth:.0%}: reading")
        sizes = 1, S, model.kv_heads, model.head_dim
        dtype = parameters.embedding.dtype
        cache = empty_cache(plain(), *sizes, dtype=dtype, layers=model.layers)
        known = len(tokens) - 1  # the last one is the first step's
        _, cache = read_prompts(parameters, [tokens[:known].tolist()], cache, model)
        key, value = cache.key, cache.value
        for name, budget, option in (("full", 0, None), *work.options):
            work.advance(f"passkey at {depth:.0%}: {name}, budget {budget}")
            cache = prepared(key, value, model.rope, option or Option(plain()), known, known)
            token, said = tokens[known:], []
            for _ in range(ANSWER):
                found, cache = predict(parameters, token, cache, model, option, is_full)
                token = np.asarray(jnp.argmax(found, axis=-1), np.int32)
                said.append(int(token[0]))
            text = tokenizer.decode(said)
            row = {"option": name, "budget": budget, **work.where_full, "depth": depth}
            yield {**row, "found": PASSKEY in text, "said": text}


MEASUREMENTS = {"options": by_option, "layers": by_layer, "drift": by_drift, "needles": by_needle}


def table(rows: Sequence[Row]) -> Table:
    """Rows as a table: what they have in common is its columns."""
    names = [name for name in rows[0] if name != "config" and all(name in row for row in rows)]
    table = Table(*names)
    for row in rows:
        table.add_row(
            *(f"{x:.4f}" if isinstance(x, float) else str(x) for x in map(row.get, names))
        )
    return table


def draw(rows: Sequence[Row], path: Path) -> None:
    """Divergence from full attention and perplexity against the budget, a line for each option."""
    from matplotlib.figure import Figure

    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["budget"]):
        lines.setdefault(f"{row['option']}, {row['text']}", []).append(row)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for label, of_line in lines.items():
        budgets = [row["budget"] for row in of_line]
        for one, what in zip(axes, ("divergence", "ratio"), strict=True):
            one.plot(budgets, [row[what] for row in of_line], "o-", label=label)
    for one, label in zip(axes, ("KL(full, sparse)", "perplexity / full attention's"), strict=True):
        one.set(xscale="log", yscale="log", xlabel="budget", ylabel=label)
    axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def parsed(words: Sequence[str], rope: Rope) -> Option:
    """The option "fast" with other fields, each FIELD=VALUE; Failure where there is no such one."""
    base = named(rope)["fast"]
    changes = dict(word.partition("=")[::2] for word in words)
    if unknown := changes.keys() - {*FIELDS, "copies"}:
        raise Failure(
            f"--config: expected FIELD=VALUE of {', '.join((*FIELDS, 'copies'))}, got "
            f"{', '.join(sorted(unknown))}"
        )
    try:
        values = {x: int(v) if v.isdecimal() else v != "none" and v for x, v in changes.items()}
        copies = values.pop("copies", base.copies)
        if copies is not None and not 0 <= copies <= MOST_COPIES:
            raise ValueError(f"copies: expected 0 to {MOST_COPIES}, got {copies}")
        config = dataclasses.replace(base.config, cells=False, **values)
        has_cells = config.num_cells <= MOST_CELLS
        return Option(dataclasses.replace(config, cells=has_cells), copies)
    except ValueError as problem:
        raise Failure(f"--config {shlex.join(words)}: {problem}") from None


def chosen(arguments: argparse.Namespace, rope: Rope) -> list[tuple[str, int, Option]]:
    """The named options at each budget, and those of configs: names, budgets, options."""
    names = dict.fromkeys(arguments.option)
    of_budgets = {budget: options(rope, budget) for budget in arguments.budget}
    found = [(name, budget, x[name]) for budget, x in of_budgets.items() for name in names]
    for words in arguments.config:
        option = parsed(words, rope)
        found.append((" ".join(words), option.config.heavy_size, option))
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.evaluate", description=__doc__)
    parser.add_argument("measure", nargs="?", choices=MEASUREMENTS, default="options")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--text", choices=TEXTS, nargs="+", default=["documentation"])
    parser.add_argument("--length", type=int, default=8192, help="tokens of the text")
    parser.add_argument("--tokens", type=int, help="of these, decoded at the end; an eighth")
    parser.add_argument("--prompt", type=int, help="tokens codebooks are trained on; all others")
    parser.add_argument("--budget", type=int, nargs="+", default=[BUDGET])
    parser.add_argument("--option", nargs="*", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument(
        "--config",
        nargs="+",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help='one more option: "fast" with other fields, as `--config num_bits=5 rerank=8 '
        "estimate_rest=codes`; may be given again",
    )
    parser.add_argument(
        "--full-layers", type=int, nargs="+", default=[], help="layers with full attention"
    )
    parser.add_argument("--output", type=Path, help="a .json file for the rows; a .png beside it")
    parser.add_argument("--commit", help="where git does not tell: of the code that is measured")
    return parser


def check(arguments: argparse.Namespace, model: Model) -> None:
    """Failure for numbers that do not fit each other; what was left out becomes a number."""
    length, context = arguments.length, model.context
    check_layers(arguments.full_layers, model)
    if arguments.tokens is None:
        arguments.tokens = max(length // 8 // BLOCK, 1) * BLOCK
    tokens = arguments.tokens
    if not 2 * BLOCK <= length <= context:
        raise Failure(
            f"--length: expected {2 * BLOCK} to {context}, got {length}; the model reads no more"
        )
    if tokens % BLOCK or not 0 < tokens < length:
        raise Failure(
            f"--tokens: expected a multiple of {BLOCK} below {length}, got {tokens}; the tokens "
            "before them are the prompt"
        )
    if arguments.prompt is None:
        arguments.prompt = length - tokens
    if not 0 < arguments.prompt <= length - tokens:
        raise Failure(
            f"--prompt: expected 1 to {length - tokens}, got {arguments.prompt}; codebooks are "
            "trained before tokens are decoded"
        )
    if min(arguments.budget) < 1:
        raise Failure(f"--budget: expected 1 or more, got {min(arguments.budget)}")
    if arguments.measure == "layers" and arguments.full_layers:
        raise Failure(
            "--full-layers: not with layers, which leaves each full in turn; leave it out"
        )
    if arguments.measure == "needles" and arguments.prompt != length - tokens:
        raise Failure("--prompt: not with needles, whose codebooks are of all tokens; leave it out")
    if not (arguments.option or arguments.config):
        raise Failure("--option: expected a name, or --config; got neither")
    if max(arguments.budget) > length:
        raise Failure(f"--budget: expected at most --length, {length}, got {max(arguments.budget)}")
    if arguments.output:
        try:
            output_path(arguments.output, "")
        except ValueError as problem:
            raise Failure(str(problem)) from None


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The results file, which is written after each row; an interrupt ends it."""
    loaded = load(arguments.model, jnp.bfloat16 if has_gpu() else jnp.float32)
    check(arguments, loaded.model)
    began = time.perf_counter()
    texts = {x: tokens_of(x, arguments.length, loaded.tokenizer) for x in arguments.text}
    results = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": repeatable(arguments.words, "examples.evaluate"),
        **find_commit(arguments.commit),
        "machine": describe_machine(),
        **{name: getattr(arguments, name) for name in ABOUT},
        "dtype": loaded.parameters.embedding.dtype.name,
        "tokens_a_step": tokens_a_step(),
        "full_perplexity": {},
        "rows": [],
    }
    with console.status("") as status, contextlib.suppress(KeyboardInterrupt):
        options = chosen(arguments, loaded.model.rope)
        work = Work(loaded, options, arguments.prompt, arguments.full_layers, status.update)
        for text, subject in texts.items():
            if arguments.measure != "needles":
                status.update(f"reading {len(subject)} tokens with full attention")
                subject = read(loaded.parameters, loaded.model, subject, arguments.tokens)
                results["full_perplexity"][text] = subject.perplexity()
            for row in MEASUREMENTS[arguments.measure](work, subject):
                results["rows"].append({"text": text, **row})
                results["seconds"] = round(time.perf_counter() - began)
                if arguments.output:
                    write(arguments.output, results)
                console.print(*shown(row))
    return results


def shown(row: Row) -> list[str]:
    """A row in words."""
    return [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    arguments = make_parser().parse_args(words, argparse.Namespace(words=words))
    console = Console(stderr=True)
    try:
        results = measure(arguments, console)
    except Failure as problem:
        console.print(str(problem), style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    if not results["rows"]:
        console.print("interrupted before the first row")
        return 1
    Console(width=120).print(table(results["rows"]))
    if arguments.output and arguments.measure == "options":
        draw(results["rows"], arguments.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
