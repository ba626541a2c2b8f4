"""A Llama in plain JAX, whose attention while decoding is `jax_indexer.decode_attention`.

Letters are those of jax_indexer/CONTRACT.md, and E features, F hidden features of a feed-forward
layer, V tokens of the vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int32

from jax_indexer import DecodeCache, IndexerConfig, Rope, decode_attention, rebuild

# Tokens of a prompt that are read at once.
CHUNK = 256

# Writes a step's keys and values to a layer of the cache and attends:
# (query, key, value, cache, counts=, layer=) -> (out, cache), as `decode_attention`.
Attend = Callable[..., tuple[Array, DecodeCache]]


@dataclasses.dataclass(frozen=True)
class Model:
    """What is static about a model.

    Attributes:
      layers: how many.
      heads: N, query heads.
      kv_heads: K.
      head_dim: H.
      rope: how queries and keys are turned by their positions.
      norm_epsilon: of root-mean-square normalisation.
      context: the most tokens it was trained to read.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    norm_epsilon: float
    context: int


class Layer(NamedTuple):
    """Weights of a layer, or of all layers with one more axis in front; biases may be None."""

    attention_norm: Array  # [E]
    query: Array  # [N, H, E]
    key: Array  # [K, H, E]
    value: Array  # [K, H, E]
    query_bias: Array | None  # [N, H]
    key_bias: Array | None  # [K, H]
    value_bias: Array | None  # [K, H]
    output: Array  # [E, N, H]
    feed_forward_norm: Array  # [E]
    gate: Array  # [F, E]
    up: Array  # [F, E]
    down: Array  # [E, F]


class Parameters(NamedTuple):
    """Weights of a model; `unembedding` may be the same array as `embedding`."""

    embedding: Array  # [V, E]
    layers: Layer
    norm: Array  # [E]
    unembedding: Array  # [V, E]
    cos: Array  # float32[context, H / 2]
    sin: Array  # float32[context, H / 2]


def turns(rope: Rope, context: int) -> tuple[Array, Array]:
    """Cosines and sines of the angles by which each pair has turned at each position.

    In float64, since float32 would lose 11 bits of the angle after 8192 tokens.
    """
    angles = np.arange(context)[:, None] * np.asarray(rope.frequencies)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def rms_norm(x: Float[Array, "B T E"], weight: Float[Array, "E"], epsilon: float) -> Array:
    """Root-mean-square normalisation (Zhang and Sennrich, 2019), computed in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return normed.astype(x.dtype) * weight[None, None]


def rotate(x: Float[Array, "B T n H"], cos: Array, sin: Array, rope: Rope) -> Array:
    """Rotary position embedding (Su et al., 2021); cos and sin are float32[B, T, 1, H / 2]."""
    pairs, axis = ((-1, 2), -1) if rope.pairs == "interleaved" else ((2, -1), -2)
    first, second = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:3], *pairs), axis, 0)
    both = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis)
    return both.reshape(x.shape).astype(x.dtype)


def forward(
    parameters: Parameters,
    tokens: Int32[Array, "B T"],
    counts: Int32[Array, "B"] | None,
    cache: DecodeCache,
    model: Model,
    attend: Attend,
) -> tuple[Float[Array, "B T E"], DecodeCache]:
    """Reads tokens that follow those in the cache: what the unembedding takes, and the cache.

    Each row takes the first `counts` of its tokens, None for all; the others are padding.
    """
    positions = cache.index.lengths[0][:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    cos, sin = (
        jnp.take(x, positions, axis=0, mode="clip")[:, :, None]
        for x in (parameters.cos, parameters.sin)
    )

    def project(x, weight, bias):
        out = jnp.einsum("bte,nhe->btnh", x, weight)
        return out if bias is None else out + bias[None, None]

    def layer(carry, weights: Layer):
        (x, cache), (number, w) = carry, weights
        normed = rms_norm(x, w.attention_norm, model.norm_epsilon)
        query = rotate(project(normed, w.query, w.query_bias), cos, sin, model.rope)
        key = rotate(project(normed, w.key, w.key_bias), cos, sin, model.rope)
        value = project(normed, w.value, w.value_bias)
        out, cache = attend(query, key, value, cache, counts=counts, layer=number)
        x = x + jnp.einsum("btnh,enh->bte", out, w.output)
        normed = rms_norm(x, w.feed_forward_norm, model.norm_epsilon)
        hidden = jax.nn.silu(normed @ w.gate.T) * (normed @ w.up.T)
        return (x + hidden @ w.down.T, cache), None

    numbers = jnp.arange(model.layers, dtype=jnp.int32)
    x = parameters.embedding[tokens]
    (x, cache), _ = lax.scan(layer, (x, cache), (numbers, parameters.layers))
    return rms_norm(x, parameters.norm, model.norm_epsilon), cache


def visible(cache: DecodeCache, T: int, layer: Int32[Array, ""]) -> Bool[Array, "B T S"]:
    """Which tokens each of a step's queries sees, before these are written."""
    place = cache.index.lengths[layer][:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    return jnp.arange(cache.key.shape[2], dtype=jnp.int32)[None, None] <= place[..., None]


def write(
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    cache: DecodeCache,
    counts: Int32[Array, "B"] | None,
    layer: Int32[Array, ""],
) -> tuple[DecodeCache, Bool[Array, "B T S"]]:
    """Writes a step's keys and values without codes; also says which tokens each query sees.

    `index_prompts` makes the codes of all tokens, before the first sparse step.
    """
    B, T = key.shape[:2]
    S = cache.key.shape[2]
    before = cache.index.lengths[layer]
    taken = jnp.full_like(before, T) if counts is None else counts
    after = before + jnp.where(before + taken <= S, taken, 0)
    sees = visible(cache, T, layer)
    place = before[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    place = jnp.where(place < after[:, None], place, S)  # padding goes nowhere
    at = layer, jnp.arange(B)[:, None], place
    index = dataclasses.replace(cache.index, lengths=cache.index.lengths.at[layer].set(after))
    new_key = cache.key.at[at].set(key, mode="drop")
    return DecodeCache(new_key, cache.value.at[at].set(value, mode="drop"), index), sees


def attend_to(
    query: Float[Array, "B T N H"],
    cache: DecodeCache,
    sees: Bool[Array, "B T S"],
    layer: Int32[Array, ""],
) -> Float[Array, "B T N H"]:
    """Attention to all tokens of a layer of the cache that each query sees."""
    key, value = cache.key[layer], cache.value[layer]
    return jax.nn.dot_product_attention(query, key, value, mask=sees[:, None])


def full_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    cache: DecodeCache,
    *,
    counts: Int32[Array, "B"] | None,
    layer: Int32[Array, ""],
) -> tuple[Float[Array, "B T N H"], DecodeCache]:
    """What `decode_attention` approximates: attention to every token of the cache."""
    cache, sees = write(key, value, cache, counts, layer)
    return attend_to(query, cache, sees, layer), cache


def attention(config: IndexerConfig | None, is_full: Bool[Array, "layers"] | None = None) -> Attend:
    """Sparse attention by this config, in some layers full attention; in all without a config."""
    if config is None:
        return full_attention
    sparse = functools.partial(decode_attention, config=config)
    return sparse if is_full is None else with_full_layers(sparse, is_full)


def with_full_layers(sparse: Attend, is_full: Bool[Array, "layers"]) -> Attend:
    """Sparse attention in all layers but the full ones, whose codes are written nevertheless.

    No branch returns the cache: XLA would copy it, all layers of it, in each layer.
    """

    def attend(query, key, value, cache, *, counts, layer):
        sees = visible(cache, query.shape[1], layer)
        out, cache = sparse(query, key, value, cache, counts=counts, layer=layer)
        full = functools.partial(attend_to, query, cache, sees, layer)
        return lax.cond(is_full[layer], full, lambda: out), cache

    return attend


def logits_of(parameters: Parameters, x: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
    """Float32 logits of the next tokens."""
    unembed = functools.partial(jnp.einsum, "bte,ve->btv", preferred_element_type=jnp.float32)
    return unembed(x, parameters.unembedding)


@functools.partial(
    jax.jit, static_argnames=("model", "config", "full_layers"), donate_argnames="cache"
)
def decode(
    parameters: Parameters,
    tokens: Int32[Array, "B T"],
    counts: Int32[Array, "B"] | None,
    cache: DecodeCache,
    model: Model,
    config: IndexerConfig | None,
    full_layers: tuple[int, ...] = (),
) -> tuple[Float[Array, "B T V"], DecodeCache]:
    """Logits after each of the tokens, with `attention` of this config."""
    is_full = jnp.isin(jnp.arange(model.layers), jnp.array(full_layers)) if full_layers else None
    attend = attention(config, is_full)
    x, cache = forward(parameters, tokens, counts, cache, model, attend)
    return logits_of(parameters, x), cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill(
    parameters: Parameters,
    tokens: Int32[Array, "B T"],
    counts: Int32[Array, "B"],
    cache: DecodeCache,
    model: Model,
) -> tuple[Float[Array, "B V"], DecodeCache]:
    """Reads the next part of prompts with full attention; logits after each row's last token."""
    x, cache = forward(parameters, tokens, counts, cache, model, full_attention)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    return logits_of(parameters, jnp.take_along_axis(x, last, axis=1))[:, 0], cache


def read_prompts(
    parameters: Parameters,
    prompts: Sequence[Sequence[int]],
    cache: DecodeCache,
    model: Model,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[Float[Array, "B V"], DecodeCache]:
    """Reads a prompt into each row, CHUNK tokens at a time; logits after each row's last token.

    Args:
      parameters: weights.
      prompts: the tokens of each row; a row without any keeps what it has, and its logits are 0.
      cache: to be donated.
      model: sizes.
      advance: called with how many tokens were read by the longest row.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), -(-lengths.max() // CHUNK) * CHUNK), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    logits = jnp.zeros((len(prompts), len(parameters.unembedding)), jnp.float32)
    for start in range(0, lengths.max(), CHUNK):
        counts = np.clip(lengths - start, 0, CHUNK).astype(np.int32)
        part = tokens[:, start : start + CHUNK]
        new, cache = prefill(parameters, part, counts, cache, model)
        logits = jnp.where(counts[:, None] > 0, new, logits)
        logits.block_until_ready()
        advance(counts.max())
    return logits, cache


@functools.partial(
    jax.jit, static_argnames=("config", "rope", "look_ahead", "copies"), donate_argnames="cache"
)
def index_prompts(
    cache: DecodeCache,
    rows: Bool[Array, "B"],
    config: IndexerConfig,
    *,
    lengths: Int32[Array, "B"] | None = None,
    rope: Rope | None = None,
    look_ahead: int | None = None,
    copies: int = 2,
) -> DecodeCache:
    """Trains codebooks of the marked rows on what is in the cache, in all layers.

    With `lengths` on the first so many tokens, which are those that the rows then have.
    """

    def layer(index, number):
        of = {"value": cache.value if config.estimate_rest else None, "lengths": lengths}
        ahead = {"rope": rope, "look_ahead": look_ahead, "copies": copies}
        return rebuild(index, cache.key, config, rows, layer=number, **of, **ahead), None

    numbers = jnp.arange(len(cache.key), dtype=jnp.int32)
    index, _ = lax.scan(layer, cache.index, numbers)
    return dataclasses.replace(cache, index=index)
