"""IndexerConfig: defaults, identity, and what it refuses."""

import copy
import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import IndexerConfig


def test_defaults():
    config = IndexerConfig()
    assert (config.num_subspaces, config.num_bits) == (2, 6)
    assert (config.heavy_size, config.sink_size, config.window_size) == (128, 128, 128)
    assert config.init_offset is None
    assert config.grouping == "contiguous"
    assert (config.metric, config.kmeans_iters, config.cells) == ("euclidean", 10, False)
    assert (config.rerank, config.estimate_rest) == (1, False)
    assert config.table_dtype == jnp.float32
    assert config.train_tokens is None


def test_init_offset_none_means_sink_size():
    assert IndexerConfig(sink_size=7).first_trained == 7
    assert IndexerConfig(sink_size=7, init_offset=0).first_trained == 0
    assert dataclasses.replace(IndexerConfig(sink_size=7), sink_size=9).first_trained == 9
    given = IndexerConfig(sink_size=7, init_offset=7)
    assert dataclasses.replace(given, sink_size=9).first_trained == 7


def test_configs_that_replace_tells_apart_share_no_program():
    """One program for both would give the second the first one's result."""

    @functools.partial(jax.jit, static_argnames="config")
    def first_candidate(x, config):
        return x + dataclasses.replace(config, sink_size=2).first_candidate

    follows = IndexerConfig(sink_size=7)
    stays = IndexerConfig(sink_size=7, init_offset=7)
    got = [int(first_candidate(jnp.int32(0), config=config)) for config in (follows, stays)]
    assert got == [2, 7]


def test_it_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        IndexerConfig().heavy_size = 1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        IndexerConfig(2, 6)  # pyright: ignore[reportCallIssue]


def test_equal_configs_are_one_static_argument():
    same = [
        IndexerConfig(heavy_size=5, table_dtype=jnp.bfloat16),
        IndexerConfig(heavy_size=np.int64(5), table_dtype=np.dtype(jnp.bfloat16)),
        IndexerConfig(heavy_size=5, table_dtype="bfloat16"),
        pickle.loads(pickle.dumps(IndexerConfig(heavy_size=5, table_dtype=jnp.bfloat16))),
        copy.deepcopy(IndexerConfig(heavy_size=5, table_dtype=jnp.bfloat16)),
    ]
    assert len(set(same)) == 1
    traces = []

    def function(x, config):
        traces.append(config)
        return x + config.heavy_size

    jitted = jax.jit(function, static_argnames="config")
    for config in same:
        jitted(jnp.int32(1), config=config)
    jitted(jnp.int32(1), config=IndexerConfig(heavy_size=6))
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("sizes", "queries", "expected"),
    [
        ({}, 1, 384),
        ({"sink_size": 0, "heavy_size": 0, "window_size": 0, "num_bits": 1}, 1, 3),
        ({"sink_size": 4, "heavy_size": 8, "window_size": 2, "num_bits": 8}, 1, 269),
        ({"sink_size": 4, "heavy_size": 8, "window_size": 2, "num_bits": 8}, 5, 273),
        ({"sink_size": 4, "heavy_size": 8, "window_size": 2, "init_offset": 100}, 2, 174),
        ({"sink_size": 9, "heavy_size": 0, "window_size": 500, "num_bits": 2}, 3, 509),
    ],
)
def test_list_size(sizes, queries, expected):
    assert IndexerConfig(**sizes).max_selected(queries) == expected


def test_list_size_is_for_one_query_token_unless_told():
    config = IndexerConfig(num_bits=8)
    assert config.max_selected() == config.max_selected(1) == 128 + 128 + 1 + 256


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_every_code_width_is_accepted(num_bits):
    assert IndexerConfig(num_bits=num_bits).num_bits == num_bits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_subspaces", 0),
        ("num_subspaces", -2),
        ("num_bits", 0),
        ("num_bits", 9),
        ("num_bits", -1),
        ("heavy_size", -1),
        ("heavy_size", 1.5),
        ("heavy_size", "128"),
        ("heavy_size", None),
        ("sink_size", -1),
        ("window_size", -1),
        ("init_offset", -1),
        ("init_offset", 2.0),
        ("kmeans_iters", -1),
        ("rerank", 0),
        ("rerank", 1.5),
        ("estimate_rest", True),
        ("estimate_rest", "all"),
        ("estimate_rest", None),
        ("train_tokens", 0),
        ("train_tokens", "all"),
        ("grouping", "interleaved"),
        ("grouping", None),
        ("metric", "cosine"),
        ("metric", None),
        ("table_dtype", jnp.float64),
        ("table_dtype", jnp.int32),
        ("table_dtype", "float99"),
        ("cells", 2),
    ],
)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got .+; .+") as error:
        IndexerConfig(**{name: value})
    assert str(value) in str(error.value) or repr(value) in str(error.value)


def test_sizes_may_be_zero():
    config = IndexerConfig(heavy_size=0, sink_size=0, window_size=0, init_offset=0)
    assert config.max_selected() == 65
