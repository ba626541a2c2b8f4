"""Continues a text: `python -m examples.generate --prompt-file FILE --tokens N`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.model import CHUNK, decode, index_prompts, read_prompts
from examples.options import FULL_LAYERS, check_layers, named, plain
from examples.weights import MODELS, Loaded, load
from jax_indexer import IndexerConfig, empty_cache
from parity.real_keys import Failure


def read_prompt(path: Path, new_tokens: int, loaded: Loaded) -> list[int]:
    """The tokens of a file; Failure where they, or as many new ones, do not fit the model."""
    try:
        prompt = loaded.tokenizer.encode(path.read_text()).ids
    except (OSError, UnicodeDecodeError) as problem:
        raise Failure(f"--prompt-file: expected a text file, got {path}: {problem}") from None
    context = loaded.model.context
    if not 0 < len(prompt) < context:
        raise Failure(
            f"--prompt-file: expected 1 to {context - 1} tokens, got {len(prompt)}; the model "
            f"reads {context} tokens at most, so pass another part of the text"
        )
    if not 0 < new_tokens <= context - len(prompt):
        raise Failure(
            f"--tokens: expected 1 to {context - len(prompt)}, got {new_tokens}; the model reads "
            f"{context} tokens at most, and the prompt has {len(prompt)}"
        )
    return prompt


def attended_tokens(config: IndexerConfig | None, visible: int) -> int:
    """How many tokens a query head attends to (CONTRACT.md, rules 1 to 5)."""
    if config is None or visible <= config.short_context():
        return visible
    candidates = max(visible - config.window_size - config.first_candidate, 0)
    always = min(visible, config.sink_size + config.window_size)
    return always + min(config.heavy_size, candidates)


def generate(
    loaded: Loaded,
    prompt: list[int],
    new_tokens: int,
    attention: str,
    full_layers: Sequence[int],
    console: Console,
) -> None:
    """Prints the text as it comes, and then how fast it came and what was attended to."""
    parameters, model = loaded.parameters, loaded.model
    option = None if attention == "full" else named(model.rope)[attention]
    config = option and option.config
    capacity = -(-(len(prompt) + new_tokens) // CHUNK) * CHUNK
    sizes = 1, capacity, model.kv_heads, model.head_dim
    dtype = parameters.embedding.dtype
    cache = empty_cache(config or plain(), *sizes, dtype=dtype, layers=model.layers)

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(TextColumn("reading"), *columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(prompt))
        logits, cache = read_prompts(
            parameters, [prompt], cache, model, lambda tokens: bar.advance(task, tokens)
        )
        if option:
            ahead = option.ahead(model.rope, len(prompt), new_tokens)
            cache = index_prompts(cache, jnp.ones(1, bool), config, **ahead)

    from tokenizers.decoders import DecodeStream

    text, times, shares = DecodeStream(), [], []
    for length in range(len(prompt), len(prompt) + new_tokens):
        token = int(jnp.argmax(logits))
        times.append(time.perf_counter())
        if token in loaded.ends:
            break
        print(text.step(loaded.tokenizer, token) or "", end="", flush=True)
        tokens = np.full((1, 1), token, np.int32)
        logits, cache = decode(parameters, tokens, None, cache, model, config, tuple(full_layers))
        attended = attended_tokens(config, length + 1) / (length + 1)
        full = len(set(full_layers)) / model.layers
        shares.append(full + (1 - full) * attended)
    print(flush=True)
    console.print(summary(times, shares))


def summary(times: list[float], shares: list[float]) -> str:
    """What the steps took, the first of which compiles, and what they attended to."""
    attended = f"{np.mean(shares):.1%} of the cache attended to" if shares else "no step"
    if len(times) < 3:
        return attended
    rate = (len(times) - 2) / (times[-1] - times[1])
    return f"{rate:.1f} tokens a second after the first, {attended}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.generate", description=__doc__)
    parser.add_argument("--prompt-file", type=Path, required=True, help="the text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="how many tokens to add")
    parser.add_argument(
        "--attention",
        choices=("full", "sparse"),
        default="sparse",
        help="attention while decoding",
    )
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument(
        "--full-layers",
        type=int,
        nargs="*",
        help="layers that keep full attention; without it those where it is known to help most",
    )
    return parser


def main(words: list[str] | None = None) -> int:
    options = make_parser().parse_args(words)
    console = Console(stderr=True)
    try:
        dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
        loaded = load(options.model, dtype)
        prompt = read_prompt(options.prompt_file, options.tokens, loaded)
        attention = "full" if options.attention == "full" else "balanced"
        layers = options.full_layers
        layers = FULL_LAYERS[options.model] if layers is None else layers
        check_layers(layers, loaded.model)
        generate(loaded, prompt, options.tokens, attention, layers, console)
    except Failure as problem:
        console.print(str(problem), style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
