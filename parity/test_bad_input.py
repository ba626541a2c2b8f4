"""Wrong arguments: a ValueError that names the argument, what was expected, what came, and the fix.

It comes before anything is compiled. What depends on data is no error: see test_select.
"""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    PQIndex,
    Selection,
    append,
    build_index,
    decode_attention,
    empty_cache,
    indexer_next,
    prefill,
    rebuild,
    rebuild_gain,
    reset,
    select,
    sparse_attention,
    with_cells,
)
from jax_indexer._arguments import annotated_arrays
from jax_indexer.state import ValueSums

B, T, N, K, H, S, M, C, P = 2, 1, 4, 2, 8, 32, 2, 4, 14
VALUE_H, PROMPT, LAYERS = 6, 20, 3
CONFIG = IndexerConfig(num_subspaces=M, num_bits=2, heavy_size=4, sink_size=2, window_size=3)
IP = IndexerConfig(
    num_subspaces=M, num_bits=2, heavy_size=4, sink_size=2, window_size=3, metric="ip"
)
# With sums of values.
SUMMED = dataclasses.replace(CONFIG, estimate_rest="mean")


def f32(*shape):
    return np.zeros(shape, np.float32)


def i32(*shape):
    return np.zeros(shape, np.int32)


def u8(*shape):
    return np.zeros(shape, np.uint8)


INDEX = {
    "codebooks": f32(B, K, M, C, H // M),
    "codes": u8(B, K, M, S),
    "lengths": i32(B),
    "phi": None,
}
IP_INDEX = INDEX | {"codebooks": f32(B, K, M, C, H // M + 1), "phi": f32(B, K, M)}
CACHE = {"key": f32(B, S, K, H), "value": f32(B, S, K, VALUE_H)}
SELECTION = {"indices": i32(B, T, N, P), "counts": i32(B, T, N), "weights": None}
ARGUMENTS = {
    "build_index": {"key": f32(B, S, K, H), "lengths": i32(B), "config": CONFIG},
    "rebuild": {
        "index": INDEX,
        "key": f32(B, S, K, H),
        "config": CONFIG,
        "rows": np.ones(B, bool),
        "lengths": i32(B),
    },
    "rebuild_gain": {"index": INDEX, "key": f32(B, S, K, H), "config": CONFIG},
    "reset": {"index": INDEX, "rows": np.ones(B, bool)},
    "append": {"index": INDEX, "key_new": f32(B, 3, K, H), "config": CONFIG, "counts": i32(B)},
    "select": {"query": f32(B, T, N, H), "index": INDEX, "config": CONFIG},
    "indexer_next": {
        "query": f32(B, T, N, H),
        "key_new": f32(B, T, K, H),
        "index": INDEX,
        "config": CONFIG,
    },
    "sparse_attention": {
        "query": f32(B, T, N, H),
        "key": f32(B, S, K, H),
        "value": f32(B, S, K, H),
        "selection": SELECTION,
    },
    "decode_attention": {
        "query": f32(B, T, N, H),
        "key_new": f32(B, T, K, H),
        "value_new": f32(B, T, K, VALUE_H),
        "cache": CACHE | {"index": INDEX},
        "config": CONFIG,
    },
    "prefill": {
        "key": f32(B, PROMPT, K, H),
        "value": f32(B, PROMPT, K, VALUE_H),
        "lengths": i32(B),
        "config": CONFIG,
        "cache": CACHE | {"index": INDEX},
    },
    "empty_cache": {"config": CONFIG, "batch": B, "capacity": S, "kv_heads": K, "head_dim": H},
}
FUNCTIONS = {
    f.__name__: f
    for f in (
        build_index,
        rebuild,
        rebuild_gain,
        reset,
        append,
        select,
        indexer_next,
        sparse_attention,
        decode_attention,
        prefill,
        empty_cache,
    )
}

# The function, the argument by the name that the message must use, its wrong value, and what the
# message must say about what was expected and what came.
CASES = [
    # Rank.
    ("build_index", "key", f32(B, S, H), "B, S, K, H", "[2, 32, 8]"),
    ("build_index", "lengths", i32(), "B", "int32[]"),
    ("build_index", "lengths", i32(B, 1), "B=2", "[2, 1]"),
    ("append", "key_new", f32(B, K, H), "B, t, K, H", "[2, 2, 8]"),
    ("append", "counts", i32(), "B=2", "int32[]"),
    ("append", "index.codes", u8(B, K, S), "S", "[2, 2, 32]"),
    ("select", "query", f32(N, H), "B, T, N, H", "[4, 8]"),
    ("select", "query", f32(B, T, N, H, 1), "B, T, N, H", "[2, 1, 4, 8, 1]"),
    ("select", "index.codebooks", f32(B, K, M, C * 4), "C=4", "[2, 2, 2, 16]"),
    ("select", "index.lengths", i32(), "B=2", "int32[]"),
    ("indexer_next", "key_new", f32(B, K, H), "B=2, t, K, H=8", "[2, 2, 8]"),
    ("sparse_attention", "query", f32(B, N, H), "B", "[2, 4, 8]"),
    ("sparse_attention", "key", f32(S, K, H), "B, S, K, H", "[32, 2, 8]"),
    ("sparse_attention", "value", f32(S, K, H), "B=2, S=32, K=2, H'", "[32, 2, 8]"),
    ("sparse_attention", "selection.indices", i32(B, N, P), "P", "[2, 4, 14]"),
    # Dtype: 64-bit arrays, which JAX would cut in half without a word, among them.
    ("build_index", "key", f32(B, S, K, H).astype(np.float64), "float32", "float64"),
    ("build_index", "key", i32(B, S, K, H), "float32", "int32"),
    ("build_index", "lengths", i32(B).astype(np.int64), "int32", "int64"),
    ("build_index", "lengths", f32(B), "int32", "float32"),
    ("build_index", "lengths", i32(B).astype(np.uint32), "int32", "uint32"),
    ("build_index", "lengths", i32(B).astype(bool), "int32", "bool"),
    ("append", "key_new", f32(B, 3, K, H).astype(np.float64), "float32", "float64"),
    ("append", "counts", i32(B).astype(np.int64), "int32", "int64"),
    ("append", "index.codes", i32(B, K, M, S), "uint8", "int32"),
    ("append", "index.lengths", i32(B).astype(np.int64), "int32", "int64"),
    ("select", "query", f32(B, T, N, H).astype(np.float64), "float32", "float64"),
    ("select", "query", f32(B, T, N, H).astype(np.complex64), "float32", "complex64"),
    ("select", "query", i32(B, T, N, H), "float32", "int32"),
    ("select", "query", jnp.zeros((B, T, N, H), jnp.float8_e4m3fn), "bfloat16", "float8"),
    ("select", "index.codebooks", INDEX["codebooks"].astype(np.float64), "float32", "float64"),
    ("select", "index.codes", u8(B, K, M, S).astype(np.int64), "uint8", "int64"),
    ("select", "index.codes", u8(B, K, M, S).astype(np.int8), "uint8", "int8"),
    ("select", "index.lengths", i32(B).astype(np.int64), "int32", "int64"),
    ("indexer_next", "query", f32(B, T, N, H).astype(np.float64), "float32", "float64"),
    ("indexer_next", "key_new", f32(B, T, K, H).astype(np.float64), "float32", "float64"),
    ("sparse_attention", "query", f32(B, T, N, H).astype(np.float64), "float32", "float64"),
    ("sparse_attention", "key", f32(B, S, K, H).astype(np.float64), "float32", "float64"),
    ("sparse_attention", "value", f32(B, S, K, H).astype(np.float64), "float32", "float64"),
    ("sparse_attention", "selection.indices", i32(B, T, N, P).astype(np.int64), "int32", "int64"),
    ("rebuild", "rows", i32(B), "bool", "int32"),
    ("reset", "rows", u8(B), "bool", "uint8"),
    ("rebuild", "lengths", i32(B).astype(np.int64), "int32", "int64"),
    ("rebuild", "key", f32(B, S, K, H).astype(np.float64), "float32", "float64"),
    # No arrays at all.
    ("build_index", "key", [[1.0]], "float32", "list"),
    ("build_index", "lengths", [4, 5], "int32", "list"),
    ("build_index", "lengths", 7, "int32", "int"),
    ("append", "index", None, "PQIndex", "NoneType"),
    ("append", "counts", 1, "int32", "int"),
    ("select", "query", None, "float32", "NoneType"),
    ("select", "index", (1, 2, 3), "PQIndex", "tuple"),
    ("select", "index.codes", None, "uint8", "NoneType"),
    ("rebuild", "rows", [True, False], "bool", "list"),
    ("rebuild", "index", None, "PQIndex", "NoneType"),
    ("reset", "index", (), "PQIndex", "tuple"),
    ("rebuild_gain", "config", 6, "IndexerConfig", "int"),
    ("select", "config", {"num_bits": 6}, "IndexerConfig", "dict"),
    ("build_index", "config", None, "IndexerConfig", "NoneType"),
    ("append", "config", "euclidean", "IndexerConfig", "str"),
    ("indexer_next", "config", 6, "IndexerConfig", "int"),
    ("sparse_attention", "selection", (1, 2, 3), "Selection", "tuple"),
    # Head counts that do not divide.
    ("select", "query", f32(B, T, 3, H), "K=2", "N=3"),
    ("select", "query", f32(B, T, 1, H), "K=2", "N=1"),
    ("indexer_next", "query", f32(B, T, 5, H), "K=2", "N=5"),
    ("sparse_attention", "query", f32(B, T, 3, H), "K=2", "N=3"),
    # A head dimension that does not divide into subspaces.
    ("build_index", "key", f32(B, S, K, 7), "num_subspaces=2", "H=7"),
    ("append", "key_new", f32(B, 3, K, 9), "num_subspaces=2", "H=9"),
    ("select", "query", f32(B, T, N, 7), "num_subspaces=2", "H=7"),
    # Sizes that contradict each other.
    ("build_index", "lengths", i32(B + 1), "B=2", "int32[3]"),
    ("build_index", "key", f32(B, K, S, H), "K as tokens S", "K=32, S=2"),
    ("indexer_next", "key_new", f32(B, S + 1, K, H), "T=1", "t=33"),
    ("rebuild", "rows", np.ones(B + 1, bool), "B=2", "bool[3]"),
    ("reset", "rows", np.ones((B, 1), bool), "B=2", "bool[2, 1]"),
    ("rebuild", "key", f32(B, S + 1, K, H), "", ""),
    ("rebuild_gain", "key", f32(B, S, K + 1, H), "", ""),
    ("append", "counts", i32(B + 1), "B=2", "int32[3]"),
    ("append", "key_new", f32(B + 1, 3, K, H), "", ""),
    ("append", "key_new", f32(B, 3, K + 1, H), "", ""),
    ("append", "key_new", f32(B, 3, K, 2 * H), "", ""),
    ("select", "query", f32(B + 1, T, N, H), "", ""),
    ("select", "query", f32(B, T, N, 2 * H), "", ""),
    ("select", "index.lengths", i32(B + 1), "B=2", "int32[3]"),
    ("select", "index.codes", u8(B + 1, K, M, S), "B=2", "[3, 2, 2, 32]"),
    ("select", "index.codes", u8(B, K + 1, M, S), "K=2", "[2, 3, 2, 32]"),
    ("indexer_next", "key_new", f32(B, T + 1, K, H), "T=1", "t=2"),
    ("indexer_next", "key_new", f32(B + 1, T, K, H), "", ""),
    ("sparse_attention", "query", f32(B + 1, T, N, H), "B=2", "[3, 1, 4, 8]"),
    ("sparse_attention", "query", f32(B, T, N, H + 1), "H=8", "[2, 1, 4, 9]"),
    ("sparse_attention", "value", f32(B, S, K + 1, H), "K=2", "[2, 32, 3, 8]"),
    ("sparse_attention", "selection.indices", i32(B, T, N + 1, P), "N=4", "[2, 1, 5, 14]"),
    ("sparse_attention", "selection.indices", i32(B, T + 1, N, P), "T=1", "[2, 2, 4, 14]"),
    # Capacities that do not match.
    ("sparse_attention", "value", f32(B, S + 1, K, H), "S=32", "[2, 33, 2, 8]"),
    # An index that contradicts the config.
    ("select", "index.codebooks", f32(B, K, M + 1, C, H // M), "M=2", "[2, 2, 3, 4, 4]"),
    ("select", "index.codebooks", f32(B, K, M, C * 2, H // M), "C=4", "[2, 2, 2, 8, 4]"),
    ("select", "index.codebooks", f32(B, K, M, C, H // M + 1), "=4]", "[2, 2, 2, 4, 5]"),
    ("select", "index.codes", u8(B, K, M + 2, S), "M=2", "[2, 2, 4, 32]"),
    ("append", "index.codebooks", f32(B, K, M, C * 2, H // M), "C=4", "[2, 2, 2, 8, 4]"),
    # Names and flags.
    ("build_index", "kv_layout", "BHSK", "BSKH", "BHSK"),
    ("append", "kv_layout", None, "BKSH", "None"),
    ("sparse_attention", "kv_layout", "bskh", "BSKH", "bskh"),
    ("sparse_attention", "config", 3, "IndexerConfig", "int"),
    ("indexer_next", "kv_layout", "SBKH", "BSKH", "SBKH"),
    ("select", "implementation", "cuda", "xla", "cuda"),
    ("indexer_next", "implementation", "numpy", "xla", "numpy"),
    ("sparse_attention", "implementation", "cuda", "xla", "cuda"),
    ("build_index", "implementation", "cuda", "xla", "cuda"),
    ("rebuild", "implementation", "cuda", "xla", "cuda"),
    ("rebuild_gain", "implementation", True, "xla", "True"),
    ("append", "implementation", "cuda", "xla", "cuda"),
    ("select", "selector", "sort", "top_k", "sort"),
    ("indexer_next", "selector", "sort", "top_k", "sort"),
    ("select", "return_weights", "yes", "True", "yes"),
    ("build_index", "seed", "zero", "int", "zero"),
    ("build_index", "seed", -1, "0", "-1"),
    ("rebuild", "seed", 2**32, "2**32 - 1", "4294967296"),
    ("rebuild", "kv_layout", "BHSK", "BSKH", "BHSK"),
    ("build_index", "seed", 1.5, "int", "1.5"),
    ("sparse_attention", "scale", "auto", "", "auto"),
    ("sparse_attention", "scale", True, "real", "True"),
    ("sparse_attention", "scale", i32(), "real", "int32"),
    ("sparse_attention", "scale", 10**400, "real", "1000"),
    ("sparse_attention", "return_lse", 1, "True", "1"),
    ("sparse_attention", "return_lse", "yes", "True", "yes"),
    ("sparse_attention", "logits_soft_cap", 0, "positive", "0"),
    ("sparse_attention", "logits_soft_cap", -2.5, "positive", "-2.5"),
    ("sparse_attention", "logits_soft_cap", float("inf"), "positive", "inf"),
    ("sparse_attention", "logits_soft_cap", float("nan"), "positive", "nan"),
    ("sparse_attention", "logits_soft_cap", "none", "real", "none"),
    ("sparse_attention", "logits_soft_cap", True, "real", "True"),
    ("sparse_attention", "logits_soft_cap", f32(1), "real", "array"),
    # A decode step: its tokens against each other, and against the cache.
    ("decode_attention", "query", f32(B, 2, N, H), "", ""),
    ("decode_attention", "query", f32(B, T, 3, H), "K=2", "N=3"),
    ("decode_attention", "query", f32(B, T, N, 7), "", ""),
    ("decode_attention", "key_new", f32(B, 2, K, H), "T=1", "t=2"),
    ("decode_attention", "key_new", f32(B, T, K, H).astype(np.float16), "float32", "float16"),
    ("decode_attention", "key_new", f32(B, T, K, H).astype(np.float64), "float32", "float64"),
    ("decode_attention", "value_new", f32(B, 2, K, VALUE_H), "T=1", "[2, 2, 2, 6]"),
    ("decode_attention", "value_new", f32(B, T, N, VALUE_H), "K=2", "[2, 1, 4, 6]"),
    ("decode_attention", "value_new", f32(B, T, K), "H'", "[2, 1, 2]"),
    ("decode_attention", "value_new", f32(B, T, K, VALUE_H).astype(np.float16), "float32",
     "float16"),
    ("decode_attention", "cache", None, "DecodeCache", "NoneType"),
    ("decode_attention", "cache", PQIndex(**INDEX), "DecodeCache", "PQIndex"),
    ("decode_attention", "cache.key", f32(B + 1, S, K, H), "B=2", "[3, 32, 2, 8]"),
    ("decode_attention", "cache.key", f32(B, S, K + 1, H), "K=2", "[2, 32, 3, 8]"),
    ("decode_attention", "cache.key", f32(B, S, K, 2 * H), "H=8", "[2, 32, 2, 16]"),
    ("decode_attention", "cache.key", CACHE["key"].astype(np.int8), "float32", "int8"),
    ("decode_attention", "cache.key", None, "float32", "NoneType"),
    ("decode_attention", "cache.value", f32(B, S + 1, K, VALUE_H), "S=32", "[2, 33, 2, 6]"),
    ("decode_attention", "cache.value", f32(B, S, K, H), "H'=6", "[2, 32, 2, 8]"),
    ("decode_attention", "cache.index", None, "PQIndex", "NoneType"),
    ("decode_attention", "cache.index.codes", u8(B, K, M, S + 1), "S=32", "[2, 2, 2, 33]"),
    ("decode_attention", "cache.index.codes", i32(B, K, M, S), "uint8", "int32"),
    ("decode_attention", "cache.index.lengths", i32(B + 1), "B=2", "int32[3]"),
    ("decode_attention", "cache.index.codebooks", f32(B, K, M, 2 * C, H // M), "C=4",
     "[2, 2, 2, 8, 4]"),
    ("decode_attention", "cache.index.cells", 7, "None", "int"),
    ("decode_attention", "config", 6, "IndexerConfig", "int"),
    ("decode_attention", "counts", i32(B + 1), "B=2", "int32[3]"),
    ("decode_attention", "counts", i32(B).astype(np.int64), "int32", "int64"),
    ("decode_attention", "scale", "auto", "real", "auto"),
    ("decode_attention", "logits_soft_cap", 0, "positive", "0"),
    ("decode_attention", "selector", "sort", "top_k", "sort"),
    ("decode_attention", "selector", "cells", "cells", "cells"),
    ("decode_attention", "implementation", "cuda", "xla", "cuda"),
    ("decode_attention", "kv_layout", "BHSK", "BSKH", "BHSK"),
    # A prompt, and the cache that it goes into.
    ("prefill", "key", f32(B, PROMPT, K, 7), "num_subspaces=2", "H=7"),
    ("prefill", "key", f32(B, PROMPT, K, H).astype(np.float16), "float32", "float16"),
    ("prefill", "value", f32(B, PROMPT - 1, K, VALUE_H), "s=20", "[2, 19, 2, 6]"),
    ("prefill", "value", f32(B, PROMPT, K, VALUE_H).astype(np.float16), "float32", "float16"),
    ("prefill", "lengths", 7, "int32", "int"),
    ("prefill", "lengths", i32(B + 1), "B=2", "int32[3]"),
    ("prefill", "config", None, "IndexerConfig", "NoneType"),
    ("prefill", "cache", PQIndex(**INDEX), "DecodeCache", "PQIndex"),
    ("prefill", "cache.key", f32(B, S, K + 1, H), "K=2", "[2, 32, 3, 8]"),
    ("prefill", "cache.value", f32(B, S, K, VALUE_H + 1), "H'=6", "[2, 32, 2, 7]"),
    ("prefill", "cache.index.codes", u8(B, K, M + 1, S), "M=2", "[2, 2, 3, 32]"),
    ("prefill", "rows", i32(B), "bool", "int32"),
    ("prefill", "rows", np.ones(B + 1, bool), "B=2", "bool[3]"),
    ("prefill", "seed", -1, "0", "-1"),
    ("prefill", "implementation", "cuda", "xla", "cuda"),
    ("prefill", "kv_layout", "BHSK", "BSKH", "BHSK"),
    # Sizes of an empty cache.
    ("empty_cache", "config", 3, "IndexerConfig", "int"),
    ("empty_cache", "batch", 0, "at least 1", "0"),
    ("empty_cache", "capacity", 32.0, "integer", "32.0"),
    ("empty_cache", "kv_heads", True, "integer", "True"),
    ("empty_cache", "head_dim", 7, "num_subspaces=2", "7"),
    ("empty_cache", "value_head_dim", -1, "at least 1", "-1"),
    ("empty_cache", "layers", 0, "at least 1", "0"),
    ("empty_cache", "dtype", np.float64, "bfloat16", "float64"),
    ("empty_cache", "dtype", jnp.int8, "bfloat16", "int8"),
    ("empty_cache", "dtype", "fp16", "bfloat16", "fp16"),
    ("empty_cache", "dtype", None, "bfloat16", "None"),
    ("empty_cache", "kv_layout", "BHSK", "BSKH", "BHSK"),
]  # fmt: skip
IP_CASES = [
    ("select", "index.codebooks", f32(B, K, M, C, H // M), "=5]", "[2, 2, 2, 4, 4]"),
    ("append", "index.codebooks", f32(B, K, M, C, H // M), "=5]", "[2, 2, 2, 4, 4]"),
    ("append", "index.phi", None, "float32", "None"),
    ("rebuild", "index.phi", None, "float32", "None"),
    ("append", "index.phi", f32(B, K), "B=2, K=2, M=2", "[2, 2]"),
    ("append", "index.phi", f32(B, K, M).astype(np.float64), "float32", "float64"),
    ("indexer_next", "index.phi", f32(B, K, M + 1), "M=2", "[2, 2, 3]"),
    ("decode_attention", "cache.index.phi", None, "float32", "None"),
    ("prefill", "cache.index.phi", None, "float32", "None"),
]


OPTIONAL = ("cells", "values", "high_water")


def call(function, **changes):
    """Calls a function with good arguments but for the changes, which may name an attribute."""
    kinds = {"index": PQIndex, "selection": Selection, "cache": DecodeCache}
    is_ip = changes.get("config") is IP

    def made(name, value, path):
        if isinstance(value, dict) and name in kinds:
            value = IP_INDEX if is_ip and name == "index" else value
            fields = {k: made(k, v, f"{path}.{k}") for k, v in value.items()}
            rest = {k.removeprefix(f"{path}."): v for k, v in changes.items() if "." in k}
            fields |= {k: v for k, v in rest.items() if k in fields or k in OPTIONAL}
            return kinds[name](**fields)
        return value

    arguments = ARGUMENTS[function] | {k: v for k, v in changes.items() if "." not in k}
    return FUNCTIONS[function](**{k: made(k, v, k) for k, v in arguments.items()})


def of_layers(function, **changes):
    """Good arguments of a function for state and caches of several layers, and the changes."""
    stacked = ("index", "cache", *(["key", "value"] if function != "prefill" else []))

    def stack(name, value):
        if isinstance(value, dict) and name in stacked:
            return {k: stack("index", v) for k, v in value.items()}
        return np.stack([value] * LAYERS) if name in stacked and value is not None else value

    arguments = {k: stack(k, v) for k, v in ARGUMENTS[function].items()}
    return arguments | {"layer": 1} | changes


def check_message(error, argument, expected, got):
    message = str(error.value)
    assert message.startswith(f"{argument}: expected "), message
    wanted, _, rest = message.partition(", got ")
    found, _, fix = rest.partition("; ")
    assert expected in wanted, message
    assert got in found, message
    assert len(fix.split()) > 1, message


def name_of(case):
    function, argument, value = case[:3]
    kind = (
        f"{value.dtype}{list(value.shape)}"
        if isinstance(value, (np.ndarray, jax.Array))
        else repr(value)
    )
    return f"{function}-{argument}-{kind}".replace(" ", "")


@pytest.mark.parametrize("function", ARGUMENTS)
def test_the_good_arguments_are_good(function):
    jax.block_until_ready(call(function))
    if "config" in ARGUMENTS[function]:
        jax.block_until_ready(call(function, config=IP))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_wrong_argument_is_named(case, compilations):
    function, argument, value, expected, got = case
    with pytest.raises(ValueError, match="expected") as error:
        call(function, **{argument: value})
    # Of two arguments that contradict each other either may be named.
    name = argument if expected or got else str(error.value).partition(":")[0]
    index = ("index.codebooks", "index.codes", "index.lengths", "index.phi")
    assert name in (argument, "key_new", *index)
    check_message(error, name, expected, got)
    assert compilations() == 0


@pytest.mark.parametrize("case", IP_CASES, ids=name_of)
def test_a_wrong_argument_of_the_inner_product_metric_is_named(case, compilations):
    function, argument, value, expected, got = case
    with pytest.raises(ValueError, match="expected") as error:
        call(function, **{argument: value, "config": IP})
    check_message(error, argument, expected, got)
    assert compilations() == 0


ANNOTATED = [
    (function, argument, expected)
    for function in FUNCTIONS
    for argument, expected in annotated_arrays(FUNCTIONS[function]).items()
    if argument not in ("return", "scale", "layer")
]


@pytest.mark.parametrize(("function", "argument", "expected"), ANNOTATED)
def test_what_is_expected_of_an_argument_is_what_its_annotation_says(function, argument, expected):
    # The cache of values is taken where there are sums of them.
    changes = {} if function == "sparse_attention" or argument != "value" else with_sums(function)
    with pytest.raises(ValueError, match="expected") as error:
        call(function, **changes | {argument: np.zeros([1] * 7)})
    found = re.fullmatch(rf"{argument}: expected (.*)\[(.*)\], got .*", str(error.value))
    dtypes, axes = found[1].split("/"), [x.partition("=")[0] for x in found[2].split(", ")]
    assert dtypes == [d.name for d in expected.dtypes]
    assert len(axes) == len(expected.axes)
    assert all(want in (axis, "_") for axis, want in zip(axes, expected.axes, strict=True))


def with_sums(function, config=SUMMED, of=(1, 1)):
    """Changes to good arguments: a config that keeps sums of values, and sums by `of` codes."""
    sums = ValueSums(f32(B, K, *of, VALUE_H), i32(B, K, *of))
    path = {"decode_attention": "cache.index", "prefill": "cache.index"}.get(function, "index")
    kept = {f"{path}.values": sums, f"{path}.high_water": i32(B)}
    return {"config": config} | ({} if function == "build_index" else kept)


TAKES_VALUE = ("build_index", "rebuild", "append", "indexer_next")


@pytest.mark.parametrize("function", TAKES_VALUE)
def test_the_cache_of_values_is_there_if_sums_are_kept(function, compilations):
    with pytest.raises(ValueError, match="expected") as error:
        call(function, **with_sums(function))
    check_message(error, "value", "cache of values with config.estimate_rest='mean'", "None")
    with pytest.raises(ValueError, match="expected") as error:
        call(function, value=f32(B, S, K, VALUE_H))
    check_message(error, "value", "None with config.estimate_rest=False", "ndarray")
    assert compilations() == 0


@pytest.mark.parametrize("function", ["rebuild", "append", "decode_attention", "prefill", "select"])
def test_the_sums_are_those_of_the_config(function, compilations):
    index = "cache.index" if "cache" in ARGUMENTS[function] else "index"
    value = {"value": f32(B, S, K, VALUE_H)} if function in TAKES_VALUE else {}
    with pytest.raises(ValueError, match="expected") as error:
        call(function, config=SUMMED, **value)
    check_message(error, f"{index}.values", "sums with config.estimate_rest='mean'", "None")
    with pytest.raises(ValueError, match="expected") as error:
        call(function, **with_sums(function, CONFIG))
    check_message(error, f"{index}.values", "None", "ValueSums")
    by_codes = dataclasses.replace(CONFIG, estimate_rest="codes")
    with pytest.raises(ValueError, match="expected") as error:
        call(function, **with_sums(function, by_codes) | value)
    check_message(error, f"{index}.values.sums", "M'=2", "[2, 2, 1, 1, 6]")
    if function in ("rebuild", "append", "decode_attention", "prefill"):
        other = {k: v[..., :-1] for k, v in value.items()} or {"cache.value": f32(B, S, K, 5)}
        with pytest.raises(ValueError, match="H'=6") as error:
            call(function, **with_sums(function) | other)
    assert compilations() == 0


def traceable(value):
    """jit takes arrays, and makes those of 64 bits smaller itself."""
    return hasattr(value, "dtype") and value.dtype not in (np.float64, np.int64)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c[0] == "select" and traceable(c[2])], ids=name_of
)
def test_a_wrong_argument_is_named_under_jit_too(case):
    """Shapes and types are known while tracing, so the message is the same."""
    function, argument, value = case[:3]
    with pytest.raises(ValueError, match="expected") as eager:
        call(function, **{argument: value})
    with pytest.raises(ValueError, match="expected") as traced:
        jax.jit(lambda x: call(function, **{argument: x}))(value)
    assert str(traced.value) == str(eager.value)


def test_a_message_says_which_other_argument_a_size_comes_from():
    with pytest.raises(ValueError, match=r"^index.codes: .*axis S must be 33, as in key"):
        call("rebuild", key=f32(B, S + 1, K, H))
    with pytest.raises(ValueError, match=r"^index.lengths: .*axis B must be 2, as in query"):
        call("select", **{"index.lengths": i32(B + 1)})


@pytest.mark.parametrize(
    ("function", "arguments", "understood"),
    [
        ("build_index", {"key": f32(B, K, S, H)}, "key understood as [B=2, S=2, K=32, H=8]"),
        (
            "build_index",
            {"lengths": i32(B + 1)},
            "key understood as [B=2, S=32, K=2, H=8]",
        ),
        ("build_index", {"key": f32(B, S, K, 7)}, "key understood as [B=2, S=32, K=2, H=7]"),
        ("rebuild", {"key": f32(B, K, S, H)}, "key understood as [B=2, S=2, K=32, H=8]"),
        ("rebuild_gain", {"key": f32(B, K, S, H)}, "key understood as [B=2, S=2, K=32, H=8]"),
        ("append", {"key_new": f32(B, K, 3, H)}, "key_new understood as [B=2, t=2, K=3, H=8]"),
        (
            "append",
            {"key_new": f32(B, S + 1, K, H), "counts": None},
            "key_new understood as [B=2, t=33, K=2, H=8]",
        ),
        (
            "indexer_next",
            {"key_new": f32(B, K, T, H)},
            "key_new understood as [B=2, t=2, K=1, H=8]",
        ),
        (
            "sparse_attention",
            {"key": f32(B, K, S, H), "value": f32(B, K, S, H)},
            "key understood as [B=2, S=2, K=32, H=8]",
        ),
        (
            "sparse_attention",
            {"value": f32(B, K, S, H)},
            "key understood as [B=2, S=32, K=2, H=8], value understood as [B=2, S=2, K=32, H'=8]",
        ),
    ],
)
def test_a_message_says_how_the_axes_of_keys_were_understood(function, arguments, understood):
    tokens = "t" if "key_new" in understood else "S"
    layout = f'with kv_layout="BSKH"; kv_layout="BKSH" swaps {tokens} and K'
    with pytest.raises(ValueError, match=re.escape(f"; {understood} {layout}") + "$"):
        call(function, **arguments)


def test_a_message_names_the_layout_that_was_given():
    understood = 'key understood as [B=2, K=32, S=2, H=8] with kv_layout="BKSH"; kv_layout="BSKH"'
    with pytest.raises(ValueError, match=re.escape(understood)):
        call("build_index", key=f32(B, S, K, H), kv_layout="BKSH")


@pytest.mark.parametrize("number", [7, np.int32(7), np.array(7, np.int32), jnp.int32(7)], ids=repr)
@pytest.mark.parametrize(
    ("function", "argument"),
    [("build_index", "lengths"), ("append", "counts"), ("indexer_next", "counts")],
)
def test_one_number_for_all_rows_is_said_to_need_an_array(function, argument, number):
    text = argument if isinstance(number, (jax.Array, np.ndarray)) else "7"
    with pytest.raises(ValueError, match=rf"^{argument}: .*jnp\.full\({B}, {text}, jnp\.int32\)"):
        call(function, **{argument: number})


@pytest.mark.parametrize(
    ("function", "key"), [("sparse_attention", "key"), ("indexer_next", "key_new")]
)
def test_query_and_key_in_each_others_place_are_seen_as_such(function, key):
    arguments = {"query": ARGUMENTS[function][key], key: ARGUMENTS[function]["query"]}
    with pytest.raises(ValueError, match=rf"^query: .*; swap query and {key} if"):
        call(function, **arguments)
    with pytest.raises(ValueError, match=r"^query: .*; query is \[B, T, N, H\]"):
        call(function, query=f32(B, T, 3, H))


def test_a_head_major_cache_is_not_taken_for_a_query():
    cache = f32(B, K, S, H)  # as [B, S, K, H]: 2 tokens of 32 heads
    with pytest.raises(
        ValueError, match=r"^query: .*; mind the layout of key; .*kv_layout="
    ) as error:
        call("sparse_attention", key=cache, value=cache)
    assert "swap query" not in str(error.value)


@pytest.mark.parametrize("function", ["reset", "rebuild"])
def test_numbers_of_rows_are_not_to_be_cast_to_a_mask(function):
    with pytest.raises(ValueError, match=r"^rows: .*; give a mask, True at what is meant"):
        call(function, rows=np.asarray([1, 0], np.int32))


def test_more_tokens_than_a_row_can_hold_are_refused_without_counts():
    many = f32(B, S + 1, K, H)
    for function, others in (("append", {}), ("indexer_next", {"query": f32(B, S + 1, N, H)})):
        with pytest.raises(ValueError, match=r"^key_new: expected at most t=S=32 .*, got t=33; "):
            call(function, key_new=many, counts=None, **others)
        call(function, key_new=many, counts=i32(B), **others)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(
    ("function", "argument"),
    [("build_index", "key"), ("append", "key_new"), ("sparse_attention", "value")],
)
def test_a_cache_of_8_bits_is_to_be_cast_to_16(function, argument, dtype):
    array = ARGUMENTS[function][argument].astype(jnp.dtype(dtype))
    with pytest.raises(ValueError, match=r"; cast with \.astype\(jnp\.bfloat16\)"):
        call(function, **{argument: array})
    with pytest.raises(ValueError, match=r"; cast with \.astype\(jnp\.bfloat16\), and .* scales"):
        call(function, **{argument: array.astype(np.int8)})


LAYERED = (
    "rebuild",
    "rebuild_gain",
    "reset",
    "append",
    "select",
    "indexer_next",
    "sparse_attention",
    "decode_attention",
    "prefill",
)


def test_every_function_that_takes_a_layer_is_tested_with_one():
    takes = {f for f in FUNCTIONS if "layer" in inspect.signature(FUNCTIONS[f]).parameters}
    assert takes == set(LAYERED)


@pytest.mark.parametrize("function", LAYERED)
def test_what_is_no_number_of_a_layer_is_refused(function, compilations):
    for layer, got in (
        (1.0, "float"),
        (True, "bool"),
        (np.True_, "bool"),
        ("first", "str"),
        (i32(1), "int32[1]"),
        (np.array(1), "int64[]"),
        (f32(), "float32[]"),
    ):
        with pytest.raises(ValueError, match="expected") as error:
            call(function, **of_layers(function, layer=layer))
        check_message(error, "layer", "int32", got)
    assert compilations() == 0


@pytest.mark.parametrize("function", [f for f in LAYERED if f != "reset"])
def test_several_layers_ask_for_the_number_of_one(function, compilations):
    with pytest.raises(ValueError, match=r"; of several layers say which with layer=\.\.\.$"):
        call(function, **of_layers(function, layer=None))
    assert compilations() == 0


@pytest.mark.parametrize("function", LAYERED)
def test_a_layer_of_what_has_no_layers_is_refused(function, compilations):
    with pytest.raises(ValueError, match=r", got .*; leave layer= out for what has no axis of lay"):
        call(function, layer=1)
    assert compilations() == 0


def test_with_cells_asks_for_layers_too(compilations):
    config = IndexerConfig(**{**dataclasses.asdict(CONFIG), "cells": True})
    index = PQIndex(**INDEX)
    stacked = jax.tree.map(lambda x: np.stack([x] * LAYERS), index)
    with pytest.raises(ValueError, match=r"^index.codebooks: .*; leave layer= out"):
        with_cells(index, config, layer=1)
    with pytest.raises(ValueError, match=r"^index.cells: .*; use with_cells\(index, config\)"):
        with_cells(stacked, config, layer=1)
    assert compilations() == 0
    made = with_cells(stacked, config)
    with pytest.raises(ValueError, match=r"^layer: expected an int32 scalar"):
        with_cells(made, config, layer=1.5)


@pytest.mark.parametrize(
    ("function", "changes", "argument", "advice"),
    [
        # One of two has layers: to add or to leave out layer= would not mend it.
        ("rebuild", {"index": INDEX, "layer": 1}, "index.codebooks", "needs an axis of layers in"),
        ("rebuild", {"key": f32(B, S, K, H), "layer": None}, "index.codebooks", "take the layer"),
        ("sparse_attention", {"value": f32(B, S, K, H)}, "value", "as key has"),
        ("sparse_attention", {"key": f32(B, S, K, H), "layer": None}, "value", "take the layer"),
        ("sparse_attention", {"value": f32(2, B, S, K, H)}, "value", "axis layers must be 3"),
        ("decode_attention", {"cache": CACHE | {"index": INDEX}, "layer": 1}, "cache.key", "leave"),
        ("decode_attention", {"cache.index": PQIndex(**INDEX)}, "cache.index.codebooks",
         "needs an axis of layers in front, as cache.key has"),
        ("decode_attention", {"cache.index.lengths": i32(2, B)}, "cache.index.lengths",
         "axis layers must be 3, as in cache.key"),
        ("prefill", {"cache.value": f32(2, B, S, K, VALUE_H)}, "cache.value", "must be 3"),
    ],
)  # fmt: skip
def test_layers_must_agree(function, changes, argument, advice, compilations):
    with pytest.raises(ValueError, match=rf"^{re.escape(argument)}: expected .*; .*{advice}"):
        call(function, **of_layers(function, **changes))
    assert compilations() == 0


def test_build_index_takes_the_cache_of_one_layer():
    """It has no `layer` to be told of."""
    with pytest.raises(ValueError, match=r"^key: .*; of several layers take one, or .*jax\.vmap"):
        call("build_index", key=f32(LAYERS, B, S, K, H))


def test_reset_of_layers_that_are_not_told_is_of_all():
    lengths = call("reset", **of_layers("reset", layer=None)).lengths
    assert lengths.shape == (LAYERS, B)


@pytest.mark.parametrize("function", ["select", "reset"])
def test_a_cache_is_not_its_index(function):
    with pytest.raises(ValueError, match=r"^index: expected a PQIndex, got DecodeCache; pass its"):
        call(function, index=DecodeCache(**CACHE, index=PQIndex(**INDEX)))


@pytest.mark.parametrize(
    ("function", "name"), [("decode_attention", "key_new"), ("prefill", "key")]
)
def test_a_key_and_a_cache_in_each_others_place_are_seen_as_such(function, name):
    cache = DecodeCache(**CACHE, index=PQIndex(**INDEX))
    with pytest.raises(ValueError, match=rf"^{name}: .* got DecodeCache; mind the order of the"):
        call(function, **{name: cache, "cache": ARGUMENTS[function][name]})


def test_a_step_of_more_tokens_than_a_row_can_hold_is_refused_without_counts():
    tokens = {"query": f32(B, S + 1, N, H), "key_new": f32(B, S + 1, K, H)}
    tokens |= {"value_new": f32(B, S + 1, K, VALUE_H)}
    with pytest.raises(ValueError, match=r"^key_new: expected at most T=S=32 .*, got T=33; "):
        call("decode_attention", **tokens)
    call("decode_attention", counts=i32(B), **tokens)


def test_a_prompt_that_is_longer_than_the_cache_is_refused(compilations):
    prompt = {"key": f32(B, S + 1, K, H), "value": f32(B, S + 1, K, VALUE_H)}
    with pytest.raises(ValueError, match=r"^key: expected at most s=S=32 .*, got s=33; .*larger"):
        call("prefill", **prompt)
    assert compilations() == 0


@pytest.mark.parametrize(("argument", "value"), [("rows", np.ones(B, bool)), ("layer", 0)])
def test_rows_and_layer_of_no_cache_are_refused(argument, value, compilations):
    with pytest.raises(ValueError, match=rf"^{argument}: expected None without a cache, got .*; p"):
        call("prefill", cache=None, **{argument: value})
    assert compilations() == 0


@pytest.mark.parametrize("fields", [{"num_bits": 3}, {"cells": True}, {"window_size": 1}])
def test_a_cache_of_another_config_is_refused(fields, compilations):
    """What cells are kept for is in the config too."""
    config = IndexerConfig(**{**dataclasses.asdict(CONFIG), "cells": "window_size" in fields})
    cache = empty_cache(config, B, S, K, H, value_head_dim=VALUE_H, dtype=np.float32)
    other = dataclasses.replace(config, **fields)
    jax.block_until_ready(cache)
    before = compilations()
    for function in ("decode_attention", "prefill"):
        with pytest.raises(ValueError, match=r"^cache\.index\..*config"):
            call(function, cache=cache, config=other)
    assert compilations() == before


def test_a_traced_seed_is_said_to_be_none():
    with pytest.raises(ValueError, match=r"^seed: .*pass a Python int"):
        jax.jit(lambda seed: call("build_index", seed=seed))(3)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError):
        call("select", budget=7)


@pytest.mark.parametrize("function", ["append", "indexer_next"])
def test_select_needs_no_phi_but_append_does(function):
    call("select", config=IP, **{"index.phi": None})
    with pytest.raises(ValueError, match=r"^index\.phi"):
        call(function, config=IP, **{"index.phi": None})


@pytest.mark.parametrize("axis", range(4))
def test_empty_axes_are_refused(axis, compilations):
    shape = [B, T, N, H]
    shape[axis] = 0
    with pytest.raises(ValueError, match=r"^query: expected .+ got .+"):
        call("select", query=f32(*shape))
    shape = [B, S, K, H]
    shape[axis] = 0
    with pytest.raises(ValueError, match=r"^key: expected .+ got .+"):
        call("build_index", key=f32(*shape))
    assert compilations() == 0


def test_what_is_not_there_is_not_implemented():
    """The caller's mistake is a ValueError, the library's limit is not."""
    if jax.devices()[0].platform == "cpu":
        for function in sorted(set(ARGUMENTS) - {"reset", "empty_cache"}):
            with pytest.raises(NotImplementedError, match=r"^implementation: .+"):
                call(function, implementation="triton")
