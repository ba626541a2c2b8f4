"""decode_attention with `rerank` and `estimate_rest`, against the contract in float64.

Inputs are small integers, as in test_decode_attention: scores, products and sums of values are
exact, so who is in the pool and who is attended to is certain; outputs are off by float32 rounding.
"""

import contextlib
import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    PQIndex,
    append,
    build_index,
    decode_attention,
    empty_cache,
    indexer_next,
    prefill,
    rebuild,
    reset,
)
from jax_indexer.kernels import backend
from jax_indexer.kernels.tuning import H100
from jax_indexer.state import ValueSums
from jax_indexer.values import sums_by
from parity import oracle
from parity.test_decode_attention import (
    INT32,
    SMALL,
    Case,
    clipped,
    decode_by_kernels,
    draw,
    layer_of,
    sizes,
    written,
)
from parity.test_kernels import RUNNERS, UNOPTIMIZED, Runner

# Float32 rounding of exponentials and of sums of some hundred terms; one rounding to the dtype.
TOLERANCE = {"float32": 4e-6, "bfloat16": 1e-2, "float16": 1e-3}
OPTIONS = ("codes", "mean", "rerank", "rerank, codes", "rerank, mean")


def options(name, factor=3):
    """The fields of a config that an option stands for."""
    rest = next((x for x in ("codes", "mean") if x in name), False)
    return sizes(rerank=factor if "rerank" in name else 1, estimate_rest=rest)


def with_sums(case, cache):
    """The cache with the sums of its values, counted one by one."""
    config, index = case.config, cache.index
    if not config.estimate_rest:
        return cache
    layers = range(case.layers) if case.layers is not None else (None,)
    found = []
    for layer in layers:
        value, codes, lengths = (
            x if layer is None else x[layer] for x in (cache.value, index.codes, index.lengths)
        )
        sums, counts = oracle.value_sums(value, codes, lengths, config, case.kv_layout)
        found.append(ValueSums(sums.astype(np.float32), counts.astype(np.int32)))
    values = found[0]
    if case.layers is not None:
        values = jax.tree.map(lambda *x: np.stack(x), *found)
    high_water = np.clip(index.lengths, 0, index.codes.shape[-1])
    index = dataclasses.replace(index, values=values, high_water=high_water)
    return dataclasses.replace(cache, index=index)


@functools.partial(
    jax.jit,
    static_argnames=("config", "kv_layout", "implementation", "selector"),
    compiler_options=UNOPTIMIZED,
)
def decode(query, new, cache, counts, layer, soft_cap, *, config, **static):
    return decode_attention(
        query, *new, cache, config, counts=counts, layer=layer, logits_soft_cap=soft_cap, **static
    )


def check_step(case, query, new, cache, counts, *, soft_cap=None):
    """A step's output and sums are the oracle's; the state after it."""
    layer = None if case.layer is None else jnp.int32(case.layer)
    out, after = decode(
        *jax.tree.map(jnp.asarray, (query, new, cache, counts)), layer, soft_cap,
        config=case.config, kv_layout=case.kv_layout, implementation="xla",
    )  # fmt: skip
    check_after(case, query, new, cache, counts, out, after, soft_cap=soft_cap)
    return after


def check_after(case, query, new, cache, counts, out, after, *, soft_cap=None):
    """An output and the state after a step are the oracle's."""
    config = case.config
    after = jax.tree.map(np.asarray, after)
    if case.layers is not None:
        for i in set(range(case.layers)) - {clipped(case)}:
            jax.tree.map(np.testing.assert_array_equal, layer_of(after, i), layer_of(cache, i))
        after, cache = (layer_of(x, clipped(case)) for x in (after, cache))
    before = np.clip(cache.index.lengths.astype(np.int64), 0, case.S)
    wanted = np.full(len(before), case.T) if counts is None else np.clip(counts, 0, case.T)
    taken = np.where(before + wanted <= case.S, wanted, 0)
    index = after.index
    for name, one in zip(("key", "value"), new, strict=True):
        want = written(getattr(cache, name), one, before, taken, case.kv_layout)
        got = getattr(after, name)
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8), err_msg=name)
    if config.estimate_rest:
        sums, number = oracle.value_sums(
            after.value, index.codes, index.lengths, config, case.kv_layout
        )
        np.testing.assert_array_equal(index.values.counts, number)
        np.testing.assert_array_equal(index.values.sums, sums)
    table = oracle.exact_table(query, index.codebooks).astype(np.float32)
    want = oracle.decode_output(
        query, after.key, after.value, table, index.codes, index.lengths,
        None if counts is None else taken, config, soft_cap=soft_cap, kv_layout=case.kv_layout,
    )  # fmt: skip
    assert out.dtype == query.dtype
    tolerance = TOLERANCE[case.dtype]
    np.testing.assert_allclose(
        np.asarray(out, np.float64), want, rtol=tolerance, atol=2 * tolerance
    )


CASES = {
    "plain": Case(),
    "three query tokens": Case(
        T=3, counts=True, G=4, H=34, of_value=20, dtype="bfloat16", kv_layout="BKSH",
        sizes=sizes(init_offset=9),
    ),
    "many new tokens": Case(T=11, counts=True, G=1, K=1),
    "without sink and window": Case(
        dtype="float16", counts=True, G=1, sizes=sizes(sink_size=0, window_size=0)
    ),
    "no budget, and a window larger than the context": Case(
        T=3, G=7, K=1, sizes=sizes(heavy_size=0, window_size=95), cache_dtype="bfloat16"
    ),
    "no budget": Case(sizes=sizes(heavy_size=0)),
    "all sink": Case(sizes=sizes(heavy_size=0, window_size=0, sink_size=20, init_offset=0)),
    "three subspaces": Case(H=12, sizes=sizes(num_subspaces=3)),
    "a pool of more than there is": Case(sizes=sizes(heavy_size=40), S=70),
    "the inner product": Case(sizes=sizes(metric="ip")),
    "cells": Case(selector="cells", counts=True),
    "cells of three query tokens": Case(selector="cells", T=3, counts=True, kv_layout="BKSH"),
    "cells, no budget": Case(selector="cells", sizes=sizes(heavy_size=0)),
    "layers of cells of eight query tokens": Case(
        selector="cells", T=8, K=1, G=2, layers=2, layer=1
    ),
    "the middle layer": Case(layers=3, layer=1, T=2, counts=True),
    "layers of cells, from the end": Case(layers=3, layer=-7, selector="cells", kv_layout="BKSH"),
}  # fmt: skip


def case_of(name, option, factor=3):
    return dataclasses.replace(CASES[name], sizes=CASES[name].sizes + options(option, factor))


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(("plain", option) for option in OPTIONS),
        *((name, option) for name in CASES if name != "plain" for option in OPTIONS[-2:]),
    ],
)
def test_a_step_is_the_oracles(name, option):
    """Rows full, short, empty, of lengths that are none; garbage behind them is not read."""
    case = case_of(name, option)
    query, new, cache, counts = draw(case, 16)
    soft_cap = np.float32(3) if case.counts else None
    check_step(case, query, new, with_sums(case, cache), counts, soft_cap=soft_cap)


# Several parts of a pool, of cells, and of tokens that are weighed.
IN_PARTS = dataclasses.replace(
    SMALL, weighed_tile=32, weighed_tokens=16, ranked_bytes=1024, lists_at_once=2, others_at_once=2
)
# The interpreter compiles for seconds, checked memory is slow.
INTERPRETED = {
    ("three query tokens", "rerank, codes"), ("many new tokens", "codes"), ("cells", "codes"),
    ("a pool of more than there is", "rerank"), ("no budget", "mean"),
    ("layers of cells, from the end", "rerank, mean"),
    ("cells of three query tokens", "codes"), ("cells", "rerank, codes"),
    ("cells, no budget", "mean"), ("cells, no budget", "rerank, codes"),
}  # fmt: skip
ON_CHECKED_MEMORY = {
    ("cells", "rerank, codes"), ("the middle layer", "rerank, mean"), ("all sink", "codes"),
    ("layers of cells of eight query tokens", "rerank"),
    ("cells of three query tokens", "rerank, codes"),
}  # fmt: skip


def is_run(runner, *what, interpreted=INTERPRETED, on_checked_memory=ON_CHECKED_MEMORY):
    here = {"interpreter": interpreted, "checked memory": on_checked_memory}
    return runner == "triton" or what in here[runner]


@pytest.mark.parametrize(
    ("runner", "name", "option"),
    [
        pytest.param(runner, name, option, id=f"{runner}-{name}-{option}", marks=marks)
        for name in CASES
        for option in OPTIONS
        for runner, marks in RUNNERS.items()
        if is_run(runner, name, option)
    ],
)
def test_kernels_do_it(runner, name, option):
    """Cut up small, and on a GPU as it is tuned too."""
    case, run = case_of(name, option, 7), Runner(runner)
    query, new, cache, counts = draw(case, 4 if runner == "checked memory" else 16)
    cache = with_sums(case, cache)
    soft_cap = np.float32(3) if case.counts else None
    layer = None if case.layer is None else np.int32(case.layer)
    for tuning in (IN_PARTS, H100) if runner == "triton" else (IN_PARTS,):
        out, after = run(
            decode_by_kernels, query, new, cache, counts, np.float32(case.H**-0.5), soft_cap,
            layer, config=case.config, selector=case.selector, kv_layout=case.kv_layout,
            tuning=tuning,
        )  # fmt: skip
        check_after(case, query, new, cache, counts, out, after, soft_cap=soft_cap)


@pytest.mark.parametrize("option", ["codes", "rerank, codes"])
@pytest.mark.parametrize("runner", ["interpreter", "checked memory"])
def test_ties_between_cells_are_counted(runner, option):
    """Where all cells lie at the cut, the first tokens win, of any cell."""
    case = dataclasses.replace(case_of("cells", option), counts=False)
    query, new, cache, _ = draw(case, 4)
    cache = with_sums(case, all_logits_are_equal(cache))
    scale = np.float32(case.H**-0.5)
    out, after = Runner(runner)(
        decode_by_kernels, query, new, cache, None, scale, None, None, config=case.config,
        selector=case.selector, kv_layout=case.kv_layout, tuning=IN_PARTS,
    )  # fmt: skip
    check_after(case, query, new, cache, None, out, after)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=15)
def test_a_step_of_any_shape_is_the_oracles(data):
    draw_from = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    case = Case(
        T=draw_from(1, 2),
        K=draw_from(1, 2),
        G=draw_from(1, 3),
        H=4 * draw_from(1, 2, 3),
        of_value=draw_from(1, 4, 7),
        S=draw_from(40, 64),
        counts=data.draw(st.booleans()),
        kv_layout=draw_from("BSKH", "BKSH"),
        sizes=options(data.draw(st.sampled_from(OPTIONS)), draw_from(2, 4))
        + sizes(
            num_subspaces=draw_from(1, 2, 4),
            num_bits=draw_from(1, 3),
            heavy_size=draw_from(1, 5),
            sink_size=draw_from(0, 3),
            window_size=draw_from(0, 4),
            init_offset=draw_from(None, 0, 6),
        ),
    )
    query, new, cache, counts = draw(case, 5, seed=data.draw(st.integers(0, 99)))
    check_step(case, query, new, with_sums(case, cache), counts)


# Data that is hard to add up.


def one_key_has_all(cache):
    key = np.array(cache.key)
    key[:, 40] = 40
    return dataclasses.replace(cache, key=key)


def all_logits_are_equal(cache):
    key, codebooks = np.zeros_like(cache.key), np.zeros_like(cache.index.codebooks)
    index = dataclasses.replace(cache.index, codebooks=codebooks)
    return dataclasses.replace(cache, key=key, index=index)


def logits_are_huge(cache):
    index = dataclasses.replace(cache.index, codebooks=cache.index.codebooks * 2000)
    return dataclasses.replace(cache, key=cache.key * 2000, index=index)


def keys_say_otherwise(cache):
    """What PQ holds for heavy is light, by e to the power of hundreds."""
    return dataclasses.replace(cache, key=cache.key * -100)


def one_code_is_used(cache):
    index = dataclasses.replace(cache.index, codes=np.full_like(cache.index.codes, 2))
    return dataclasses.replace(cache, index=index)


def keys_are_nan(cache):
    key = np.array(cache.key)
    key[:, 20:60:3] = np.nan
    return dataclasses.replace(cache, key=key)


def scores_are_no_numbers(cache):
    codebooks = np.array(cache.index.codebooks)
    codebooks[:, :, 0, 1] = np.nan
    codebooks[:, :, 1, 2] = np.inf
    index = dataclasses.replace(cache.index, codebooks=codebooks)
    return dataclasses.replace(cache, index=index)


def values_are_no_numbers(cache):
    value = np.array(cache.value)
    value[:, 24:32, :, 1] = np.inf
    return dataclasses.replace(cache, value=value)


HARD = {
    hard.__name__: hard
    for hard in (
        one_key_has_all, all_logits_are_equal, logits_are_huge, keys_say_otherwise,
        one_code_is_used, keys_are_nan, scores_are_no_numbers,
    )
}  # fmt: skip


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("option", OPTIONS)
def test_hard_data_is_added_up(option, hard):
    case = Case(sizes=options(option))
    query, new, cache, _ = draw(case, 4)
    lengths = np.array([case.S - 1, 70, 20, 5], np.int32)
    cache = dataclasses.replace(cache, index=dataclasses.replace(cache.index, lengths=lengths))
    cache = jax.tree.map(lambda x: np.nan_to_num(x) if x.dtype == np.float32 else x, cache)
    with np.errstate(invalid="ignore"):
        check_step(case, query, new, with_sums(case, HARD[hard](cache)), None)


@pytest.mark.parametrize("option", ["codes", "mean"])
def test_a_value_that_is_not_finite_is_in_no_sum(option):
    case = Case(sizes=options(option) + sizes(heavy_size=0))
    query, new, cache, _ = draw(case, 2)
    lengths = np.array([80, 46], np.int32)
    cache = jax.tree.map(lambda x: np.nan_to_num(x) if x.dtype == np.float32 else x, cache)
    cache = dataclasses.replace(cache, index=dataclasses.replace(cache.index, lengths=lengths))
    cache = with_sums(case, values_are_no_numbers(cache))
    after = check_step(case, query, new, cache, None)
    counts = np.asarray(after.index.values.counts).sum((2, 3)) // sums_by(case.config)[0]
    first = case.config.first_candidate
    assert (counts == np.array([[81 - 4 - 15 - first - 8], [47 - 4 - 15 - first - 4]])).all()


@pytest.mark.parametrize("length", [10, 20, 21, 40])
def test_before_a_value_is_summed_there_is_no_rest(length):
    """Of values that are all one the output is one, whatever is estimated."""
    config = IndexerConfig(
        num_bits=1, heavy_size=0, sink_size=2, window_size=4, estimate_rest="mean"
    )
    key, value = jnp.zeros((1, 50, 1, 4)), jnp.ones((1, 50, 1, 4))
    cache = prefill(key, value, jnp.array([length], jnp.int32), config)
    query = jnp.zeros((1, 1, 1, 4))
    out, _ = decode_attention(query, key[:, :1], value[:, :1], cache, config)
    np.testing.assert_allclose(out, 1, rtol=1e-6)


# What follows from the definition.


@pytest.mark.parametrize("option", OPTIONS)
def test_where_all_is_selected_the_bits_are_those_without(option):
    """Short contexts, padding, and rows of no more candidates than the budget."""
    plain = Case(S=60, sizes=sizes(heavy_size=55), counts=True, T=2)
    case = dataclasses.replace(plain, sizes=plain.sizes + options(option))
    query, new, cache, counts = draw(plain, 12)
    arrays = jax.tree.map(jnp.asarray, (query, new, cache, counts))
    static = {"kv_layout": case.kv_layout, "implementation": "xla"}
    want, _ = decode(*arrays, None, None, config=plain.config, **static)
    arrays = jax.tree.map(jnp.asarray, (query, new, with_sums(case, cache), counts))
    got, _ = decode(*arrays, None, None, config=case.config, **static)
    np.testing.assert_array_equal(got, want)


def test_a_pool_of_all_candidates_gives_the_exact_top_k():
    """By true keys, whatever the codes are."""
    case = Case(S=64, sizes=sizes(rerank=11, heavy_size=6))
    query, new, cache, _ = draw(case, 1)
    cache = jax.tree.map(lambda x: np.nan_to_num(x) if x.dtype == np.float32 else x, cache)
    index = dataclasses.replace(cache.index, lengths=np.array([63], np.int32))
    outs = []
    for seed in range(2):
        codes = np.random.default_rng(seed).integers(0, 4, index.codes.shape, np.uint8)
        other = dataclasses.replace(cache, index=dataclasses.replace(index, codes=codes))
        check_step(case, query, new, other, None)
        arrays = jax.tree.map(jnp.asarray, (query, new, other))
        static = {"config": case.config, "kv_layout": "BSKH", "implementation": "xla"}
        outs.append(decode(*arrays, None, None, None, **static)[0])
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize(("T", "rest"), [(1, "codes"), (3, "mean"), (12, "codes")])
def test_sums_after_many_steps_are_those_built_anew(T, rest):
    """Rows take as many tokens as they like, end, restart empty or with a prompt."""
    config = IndexerConfig(
        num_bits=2, heavy_size=4, sink_size=3, window_size=5, estimate_rest=rest, rerank=2
    )
    B, S, K, H, size, steps = 3, 90, 2, 8, 6, {1: 1500, 3: 500, 12: 150}[T]
    cache = empty_cache(config, B, S, K, H, value_head_dim=size, dtype=jnp.float32)
    rng = np.random.default_rng(0)

    def tokens(size, number=T):
        return jnp.asarray(rng.integers(-2, 3, (steps, B, number, K, size)), jnp.float32)

    counts = jnp.asarray(rng.integers(-1, T + 2, (steps, B)), jnp.int32)
    restarts = jnp.asarray(rng.random((steps, B)) < 0.01 * T)

    def step(cache, xs):
        key, value, counts, rows = xs
        cache = dataclasses.replace(cache, index=reset(cache.index, rows))
        query = jnp.ones((B, T, 2 * K, H))
        out, cache = decode_attention(query, key, value, cache, config, counts=counts)
        return cache, jnp.isfinite(out).all()

    xs = tokens(H), tokens(size), counts, restarts
    for part in np.array_split(np.arange(steps), 5):
        of_part = jax.tree.map(lambda x, part=part: x[part[0] : part[-1] + 1], xs)
        cache, finite = jax.jit(lambda cache, xs: jax.lax.scan(step, cache, xs))(cache, of_part)
        assert finite.all()
        check_sums(cache, config)
        prompt = jnp.asarray(rng.integers(-2, 3, (B, 50, K, H)), jnp.float32)
        rows = jnp.asarray([True, False, False])
        lengths = jnp.asarray(rng.integers(0, 50, B), jnp.int32)
        cache = prefill(prompt, prompt[..., :size], lengths, config, cache=cache, rows=rows)
        check_sums(cache, config)


def check_sums(cache, config, kv_layout="BSKH"):
    cache = jax.tree.map(np.asarray, cache)
    index = cache.index
    sums, counts = oracle.value_sums(cache.value, index.codes, index.high_water, config, kv_layout)
    np.testing.assert_array_equal(index.values.counts, counts)
    np.testing.assert_array_equal(index.values.sums, sums)
    assert counts.sum() > 0


def test_every_function_that_adds_tokens_adds_their_values():
    kv_layout = "BKSH"
    config = IndexerConfig(
        num_bits=2, heavy_size=4, sink_size=3, window_size=5, estimate_rest="codes", cells=True
    )
    rng = np.random.default_rng(0)
    key, value = (jnp.asarray(rng.integers(-3, 4, (2, 1, 90, h)), jnp.float32) for h in (8, 5))
    lengths = jnp.array([60, 40], jnp.int32)
    options = {"value": value, "kv_layout": kv_layout}

    def check(index):
        check_sums(DecodeCache(key, value, index), config, kv_layout)

    index = build_index(key, lengths, config, **options)
    check(index)
    index = append(index, jax.lax.slice_in_dim(key, 60, 80, axis=2), config, **options)
    check(index)
    index = append(index, jax.lax.slice_in_dim(key, 80, 82, axis=2), config, **options)
    check(index)
    new = jax.lax.slice_in_dim(key, 82, 83, axis=2)
    _, index = indexer_next(jnp.ones((2, 1, 2, 8)), new, index, config, **options)
    check(index)
    rows = jnp.array([True, False])
    index = rebuild(index, key, config, rows, lengths=lengths - 3, **options)
    assert index.lengths.tolist() == [57, 63]
    check(index)
    emptied = reset(index, rows).values
    assert not emptied.counts[0].any()
    assert not emptied.sums[0].any()
    np.testing.assert_array_equal(emptied.sums[1], index.values.sums[1])


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_the_first_candidate_may_be_as_far_as_numbers_go(implementation):
    config = IndexerConfig(
        num_bits=1, heavy_size=0, sink_size=INT32.max, init_offset=0, window_size=0,
        estimate_rest="codes",
    )  # fmt: skip
    cache = empty_cache(config, 1, 30, 1, 4, layers=2, dtype=jnp.float32)
    key = jnp.ones((1, 2, 1, 4))
    with backend.interpreted() if implementation == "triton" else contextlib.nullcontext():
        for _ in range(14):
            index = append(
                cache.index, key, config, value=cache.value, layer=1, implementation=implementation
            )
            cache = dataclasses.replace(cache, index=index)
    assert index.lengths.tolist() == [[0], [28]]
    assert not index.values.counts.any()


def test_codes_and_their_number_decide_what_is_kept():
    base = IndexerConfig(num_bits=3, num_subspaces=4)
    for rest, want in (("codes", (4, 8)), ("mean", (1, 1))):
        config = dataclasses.replace(base, estimate_rest=rest)
        values = empty_cache(config, 2, 30, 3, 8, value_head_dim=5).index.values
        assert values.sums.shape == (2, 3, *want, 5)
        assert values.counts.shape == (2, 3, *want)
    assert empty_cache(base, 2, 30, 3, 8).index.values is None


def test_select_knows_nothing_of_either():
    rng = np.random.default_rng(0)
    index = PQIndex(
        jnp.asarray(rng.normal(size=(1, 2, 2, 4, 4)), jnp.float32),
        jnp.asarray(rng.integers(0, 4, (1, 2, 2, 70)), jnp.uint8),
        jnp.array([66], jnp.int32),
    )
    config = IndexerConfig(num_bits=2, heavy_size=5, sink_size=2, window_size=3)
    query = jnp.asarray(rng.normal(size=(1, 1, 4, 8)), jnp.float32)
    key = jnp.ones((1, 1, 2, 8))
    want, _ = indexer_next(query, key, index, config)
    got, _ = indexer_next(query, key, index, dataclasses.replace(config, rerank=4))
    np.testing.assert_array_equal(got.indices, want.indices)


def test_together_they_are_closer_to_full_attention_than_exact_top_k():
    """On keys in clusters, at the same budget: a fourth of its error at the most."""
    rng = np.random.default_rng(0)
    S, H, config = (
        600,
        16,
        IndexerConfig(
            num_bits=4, heavy_size=16, sink_size=4, window_size=8, rerank=4, estimate_rest="codes"
        ),
    )
    centers = rng.normal(size=(30, H))
    which = rng.integers(0, 30, S)
    key = centers[which] + 0.2 * rng.normal(size=(S, H))
    value = rng.normal(size=(30, H))[which] + 0.2 * rng.normal(size=(S, H))
    key, value = (jnp.asarray(x[None, :, None], jnp.float32) for x in (key, value))
    lengths = jnp.array([S - 1], jnp.int32)
    query = jnp.asarray(rng.normal(size=(1, 1, 8, H)), jnp.float32)

    def out(config):
        cache = prefill(key, value, lengths, config)
        return np.asarray(
            decode_attention(query, key[:, -1:], value[:, -1:], cache, config)[0], np.float64
        )

    full = out(dataclasses.replace(config, heavy_size=S, rerank=1, estimate_rest=False))
    exact = out(dataclasses.replace(config, rerank=40, estimate_rest=False))
    errors = [np.linalg.norm(x - full, axis=-1).mean() for x in (out(config), exact)]
    assert errors[0] < errors[1] / 4, errors


def by_both(config, codebooks, key, value, *, scale):
    """The output behind the last of some tokens, by kernels behind "cells" and by XLA."""
    n, S = key.shape[1], 64
    cache = empty_cache(config, 1, S, 1, key.shape[3], dtype=jnp.float32)
    index = dataclasses.replace(cache.index, codebooks=jnp.asarray(codebooks)[None, None])
    first = jax.jit(append, static_argnames=("config", "implementation"))
    at = (slice(None), slice(None, n - 1))
    cache = dataclasses.replace(
        cache, key=cache.key.at[at].set(key[at]), value=cache.value.at[at].set(value[at])
    )
    for i in range(n - 1):
        part = key[:, i : i + 1]
        index = first(index, part, config, value=cache.value, implementation="xla")
    cache = dataclasses.replace(cache, index=index)
    query = np.zeros((1, 1, 1, key.shape[3]), np.float32)
    query[..., 0] = 1

    def end(implementation, selector):
        with backend.interpreted():
            out, _ = decode_attention(
                query, key[:, n - 1 :], value[:, n - 1 :], cache, config, scale=scale,
                implementation=implementation, selector=selector,
            )  # fmt: skip
        return np.asarray(out)

    return end("triton", "cells"), end("xla", None)


def check_groups(groups, wanted, rest, rerank, scale):
    """Kernels do what XLA does with tokens of at most three scores, (score, number) each."""
    config = IndexerConfig(
        num_subspaces=1, num_bits=2, heavy_size=wanted // rerank, rerank=rerank,
        estimate_rest=rest, sink_size=0, window_size=0, cells=True,
    )  # fmt: skip
    codebooks = np.zeros((1, 4, 2), np.float32)
    codebooks[0, :3, 0] = [score for score, _ in groups]
    codebooks[0, 3, 1] = 100
    score = np.concatenate([np.full(number, score, np.float32) for score, number in groups[::-1]])
    key = np.stack([score, np.zeros_like(score)], axis=-1)[None, :, None]
    value = np.stack([np.arange(len(score)), np.ones(len(score))], axis=-1)[None, :, None]
    got, want = by_both(config, codebooks, key, value.astype(np.float32), scale=scale)
    np.testing.assert_allclose(got, want, rtol=4e-6)


@pytest.mark.parametrize(("rest", "rerank", "scale"), [("mean", 1, 1), ("codes", 2, 25)])
def test_scores_next_to_the_cut_are_left(rest, rerank, scale):
    """A threshold falls next to the second score: no list of what may win has it."""
    check_groups(((6, 2), (5, 26), (1, 4)), 2, rest, rerank, scale)


@pytest.mark.parametrize(("rest", "rerank"), [("mean", 1), ("codes", 1), ("codes", 2)])
def test_of_a_scale_below_0_the_lowest_score_has_the_largest_logit(rest, rerank):
    """By e to the power of hundreds more than the best of what is left, which may win."""
    check_groups(((2, 4), (1.9, 2), (0, 12)), 4, rest, rerank, -200)


@pytest.mark.parametrize(
    ("wrong", "rerank", "rest"), [(-np.inf, 8, "mean"), (np.nan, 20, "mean"), (-np.inf, 8, "codes")]
)
def test_losers_count_beside_one_that_weighs_nothing(wrong, rerank, rest):
    """Of a scale below 0, where the worst key has the largest logit, and one of them none."""
    config = IndexerConfig(
        num_subspaces=1, num_bits=1, heavy_size=2, rerank=rerank, estimate_rest=rest,
        sink_size=0, window_size=0, cells=True,
    )  # fmt: skip
    codebooks = np.array([[[0, 0], [1, 0]]], np.float32)
    key = np.zeros((1, 30, 1, 2), np.float32)
    key[0, ::3, 0, 0], key[0, 1::3, 0, 0], key[0, 4, 0, 0], key[0, 5, 0, 0] = 1, 0.5, wrong, -120
    value = np.stack([np.arange(30), np.ones(30)], axis=-1)[None, :, None].astype(np.float32)
    got, want = by_both(config, codebooks, key, value, scale=-1.0)
    np.testing.assert_allclose(got, want, rtol=4e-6)
