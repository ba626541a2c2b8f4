"""Teacher-forced decoding of the end of a text, beside full attention."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int32

from examples.model import (
    Attend,
    Model,
    Parameters,
    forward,
    full_attention,
    index_prompts,
    logits_of,
    read_prompts,
    with_full_layers,
    write,
)
from examples.options import BUDGET, Option, plain
from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    Rope,
    append,
    decode_attention,
    empty_cache,
    rebuild,
    rebuild_gain,
)

# Tokens of the text that a call decodes.
BLOCK = 64
# From which gain on codebooks are trained again, and after how many tokens it is asked.
WORTH_REBUILDING = 0.02
ASK_EVERY = 256


def top_k_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    cache: DecodeCache,
    config: IndexerConfig,
    *,
    counts: Int32[Array, "B"] | None,
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "B T N H"], DecodeCache]:
    """`decode_attention`, had it chosen tokens by their true logits, ties included."""
    cache, sees = write(key, value, cache, counts, layer)
    key, value = cache.key[layer], cache.value[layer]
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    grouped = query.reshape(B, T, K, N // K, H)
    wide = {"preferred_element_type": jnp.float32, "precision": lax.Precision.HIGHEST}
    logits = jnp.einsum("btkgh,bskh->btkgs", grouped, key, **wide) * H**-0.5
    token = jnp.arange(S, dtype=jnp.int32)[None, None]
    visible = jnp.sum(sees, axis=-1, dtype=jnp.int32, keepdims=True)
    always = (token < config.sink_size) | (token >= visible - config.window_size)
    always, sees = (always & sees)[:, :, None, None], sees[:, :, None, None]
    candidates = jnp.where(sees & ~always, logits, -jnp.inf)
    # The least of all values: one sliced off would keep XLA from its fast top_k on a CPU.
    best, _ = lax.top_k(candidates, min(config.heavy_size, S))
    cut = jnp.min(best, axis=-1, keepdims=True)
    chosen = always | (sees & (candidates >= cut))
    weights = jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf), axis=-1)
    out = jnp.einsum("btkgs,bskh->btkgh", weights.astype(value.dtype), value, **wide)
    return out.reshape(query.shape).astype(query.dtype), cache


def attention(option: Option, is_full: Bool[Array, "layers"] | None) -> Attend:
    """The option in all layers but those that are full."""
    chosen = top_k_attention if option.exact else decode_attention
    sparse = functools.partial(chosen, config=option.config)
    return sparse if is_full is None else with_full_layers(sparse, is_full)


def tokens_a_step() -> int:
    """How many tokens a step of a block decodes: one on a GPU, as who generates text does.

    On a CPU all of them: each sees those before it, and no more is summed for the rest than one at
    a time would.
    """
    return 1 if jax.default_backend() == "gpu" else BLOCK


def in_steps(step: Callable[..., Any], cache: DecodeCache, *of_tokens: Array) -> Any:
    """What `step` makes, (cache, arrays [1, T, ...]) -> (cache, [1, T, ...]), of a block's tokens.

    Args:
      step: takes the first tokens with their batch row, and so on.
      cache: that the tokens are behind.
      *of_tokens: [BLOCK, ...], or fewer tokens of which each is a step.

    Returns:
      The same of all tokens, [BLOCK, ...], and the cache.
    """
    T = min(tokens_a_step(), len(of_tokens[0]))
    parts = (x.reshape(-1, 1, T, *x.shape[1:]) for x in of_tokens)
    cache, out = lax.scan(lambda cache, part: step(cache, *part), cache, tuple(parts))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), out), cache


@functools.partial(jax.jit, static_argnames=("model", "option"), donate_argnames="cache")
def predict(
    parameters: Parameters,
    tokens: Int32[Array, "T"],
    cache: DecodeCache,
    model: Model,
    option: Option | None,
    is_full: Bool[Array, "layers"] | None = None,
) -> tuple[Float[Array, "T V"], DecodeCache]:
    """Log-probabilities of the next tokens, with full attention for no option."""
    attend = full_attention if option is None else attention(option, is_full)

    def step(cache, tokens):
        x, cache = forward(parameters, tokens, None, cache, model, attend)
        return cache, jax.nn.log_softmax(logits_of(parameters, x))

    return in_steps(step, cache, tokens)


class Scores(NamedTuple):
    """Of each token of a text, or of all of them.

    Attributes:
      loss: minus the log-probability of the token that follows.
      divergence: KL(full, sparse), of the distributions over the token that follows.
      agrees: whether the most probable one is the same.
    """

    loss: Array
    divergence: Array
    agrees: Array


@functools.partial(jax.jit, static_argnames=("model", "option"), donate_argnames="cache")
def compare(
    parameters: Parameters,
    tokens: Int32[Array, "T"],
    following: Int32[Array, "T"],
    expected: Float[Array, "T V"],
    is_full: Bool[Array, "layers"] | None,
    cache: DecodeCache,
    model: Model,
    option: Option,
) -> tuple[Scores, DecodeCache]:
    """The scores of each of the tokens, beside log-probabilities of full attention."""
    attend = attention(option, is_full)

    def step(cache, tokens, following, expected):
        x, cache = forward(parameters, tokens, None, cache, model, attend)
        found = jax.nn.log_softmax(logits_of(parameters, x))
        loss = -jnp.take_along_axis(found, following[..., None], axis=-1)[..., 0]
        divergence = jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)
        return cache, Scores(loss, divergence, found.argmax(-1) == expected.argmax(-1))

    return in_steps(step, cache, tokens, following, expected)


@functools.partial(jax.jit, static_argnames=("config", "start", "end"), donate_argnames="cache")
def encode(cache: DecodeCache, config: IndexerConfig, start: int, end: int) -> DecodeCache:
    """Appends the codes of tokens that are in the cache but not in its index, in all layers."""

    def layer(index, number):
        new = lax.dynamic_index_in_dim(cache.key, number, keepdims=False)[:, start:end]
        value = cache.value if config.estimate_rest else None
        return append(index, new, config, value=value, layer=number), None

    numbers = jnp.arange(len(cache.key), dtype=jnp.int32)
    index, _ = lax.scan(layer, cache.index, numbers)
    return dataclasses.replace(cache, index=index)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def rebuild_where_it_gains(
    cache: DecodeCache, config: IndexerConfig
) -> tuple[DecodeCache, Int32[Array, ""]]:
    """Trains codebooks anew in the layers where `rebuild_gain` says so; how many these were."""

    def layer(index, number):
        rows = rebuild_gain(index, cache.key, config, layer=number) > WORTH_REBUILDING
        value = cache.value if config.estimate_rest else None
        index = rebuild(index, cache.key, config, rows, value=value, layer=number)
        return index, jnp.sum(rows, dtype=jnp.int32)

    numbers = jnp.arange(len(cache.key), dtype=jnp.int32)
    index, rebuilt = lax.scan(layer, cache.index, numbers)
    return dataclasses.replace(cache, index=index), jnp.sum(rebuilt)


class Reading(NamedTuple):
    """A text that full attention has read.

    Attributes:
      tokens: int32[S].
      decoded: T, how many of the last ones are decoded.
      key, value: [layers, 1, S, K, H], of all tokens.
      expected: float32[T, V], log-probabilities of what follows each of the last ones.
    """

    tokens: np.ndarray
    decoded: int
    key: Array
    value: Array
    expected: np.ndarray

    def perplexity(self) -> float:
        """Full attention's, of the decoded tokens but the first."""
        following = self.tokens[-self.decoded + 1 :]
        return float(np.exp(-self.expected[np.arange(len(following)), following].mean()))

    def scores(self, of: Scores) -> dict[str, float]:
        """An option's perplexity, its ratio to full attention's, and means of the other scores."""
        perplexity = float(np.exp(of.loss[:-1].mean()))  # nothing follows the last token
        return {
            "perplexity": perplexity,
            "ratio": perplexity / self.perplexity(),
            "divergence": float(of.divergence.mean()),
            "agreement": float(of.agrees.mean()),
        }


def read(
    parameters: Parameters,
    model: Model,
    tokens: np.ndarray,
    decoded: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Reading:
    """Reads a text with full attention, and keeps what it says of the last `decoded` tokens."""
    sizes = 1, len(tokens), model.kv_heads, model.head_dim
    dtype = parameters.embedding.dtype
    cache = empty_cache(plain(), *sizes, dtype=dtype, layers=model.layers)
    start = len(tokens) - decoded
    _, cache = read_prompts(parameters, [tokens[:start].tolist()], cache, model, advance)
    expected = []
    for at in range(start, len(tokens), BLOCK):
        new, cache = predict(parameters, tokens[at : at + BLOCK], cache, model, None)
        expected.append(np.asarray(new))
        advance(BLOCK)
    return Reading(tokens, decoded, cache.key, cache.value, np.concatenate(expected))


def prepared(
    key: Float[Array, "layers B S K H"],
    value: Float[Array, "layers B S K H"],
    rope: Rope,
    option: Option,
    prompt: int,
    length: int,
) -> DecodeCache:
    """A cache of `length` tokens that were read, with codebooks from the first `prompt` of them."""
    layers, B, S, K, H = key.shape
    cache = empty_cache(option.config, B, S, K, H, dtype=key.dtype, layers=layers)
    cache = DecodeCache(jnp.copy(key), jnp.copy(value), cache.index)
    rows, lengths = np.ones(B, bool), np.full(B, prompt, np.int32)
    ahead = option.ahead(rope, prompt, S - prompt)
    # One program for all that differ in what they do with the same codes.
    config = dataclasses.replace(option.config, heavy_size=BUDGET, rerank=1)
    cache = index_prompts(cache, rows, config, lengths=lengths, **ahead)
    return encode(cache, config, prompt, length) if prompt < length else cache


def score(
    parameters: Parameters,
    model: Model,
    reading: Reading,
    option: Option,
    prompt: int,
    *,
    full_layers: Sequence[int] | None = None,
    rebuilding: bool = False,
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, float]:
    """Decodes the last tokens of a text that was read.

    Args:
      parameters: weights.
      model: sizes.
      reading: the text.
      option: how to attend.
      prompt: tokens that codebooks are trained on; those up to the decoded ones have codes only.
      full_layers: layers with full attention; None to compile without any.
      rebuilding: whether codebooks are trained anew where `rebuild_gain` says so.
      advance: called with how many tokens were decoded.

    Returns:
      As `Reading.scores`, and how many layers were rebuilt.
    """
    start, parts, rebuilt = len(reading.tokens) - reading.decoded, [], 0
    cache = prepared(reading.key, reading.value, model.rope, option, prompt, start)
    is_full = None if full_layers is None else np.isin(np.arange(model.layers), full_layers)
    following = np.append(reading.tokens[1:], 0)  # nothing follows the last
    for at in range(0, reading.decoded, BLOCK):
        if rebuilding and at % ASK_EVERY == 0:
            cache, layers = rebuild_where_it_gains(cache, option.config)
            rebuilt += int(layers)
        place = slice(start + at, start + at + BLOCK)
        of_text = reading.tokens[place], following[place], reading.expected[at : at + BLOCK]
        new, cache = compare(parameters, *of_text, is_full, cache, model, option)
        parts.append(jax.tree.map(np.asarray, new))
        advance(BLOCK)
    found = reading.scores(Scores(*(np.concatenate(x) for x in zip(*parts, strict=True))))
    return found | {"rebuilt": rebuilt}
