"""`select(return_rest=True)` and `sparse_attention(rest=)`, against the contract in float64.

Cases, data and tolerances are those of test_rest_and_rerank, without rerank: both functions
together are what `decode_attention` does behind its append.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import Selection, select, sparse_attention
from jax_indexer.kernels import pipeline
from jax_indexer.kernels.attend import Entries, launch_listed
from jax_indexer.kernels.step import Step
from jax_indexer.kernels.tuning import H100
from jax_indexer.reference import Caches, Logits
from parity import oracle
from parity.test_decode_attention import Case, clipped, draw, layer_of, sizes
from parity.test_kernels import RUNNERS, UNOPTIMIZED, Runner
from parity.test_rest_and_rerank import (
    CASES,
    HARD,
    IN_PARTS,
    TOLERANCE,
    is_run,
    options,
    with_sums,
)


def case_of(name, option):
    return dataclasses.replace(CASES[name], sizes=CASES[name].sizes + options(option))


def wanted(case, query, cache, counts, soft_cap):
    """The oracle's output, of a selection from the cache as it is."""
    cache = layer_of(cache, clipped(case)) if case.layers is not None else cache
    index = jax.tree.map(np.asarray, cache.index)
    table = oracle.exact_table(query, index.codebooks).astype(np.float32)
    counts = None if counts is None else np.clip(counts, 0, case.T)
    return oracle.decode_output(
        query, cache.key, cache.value, table, index.codes, index.lengths, counts, case.config,
        soft_cap=soft_cap, kv_layout=case.kv_layout,
    )  # fmt: skip


def check(case, query, cache, counts, out, *, soft_cap=None, tolerance=None):
    tolerance = tolerance or TOLERANCE[case.dtype]
    want = wanted(case, query, cache, counts, soft_cap)
    np.testing.assert_allclose(
        np.asarray(out, np.float64), want, rtol=tolerance, atol=2 * tolerance
    )


def of_layer(case):
    return None if case.layer is None else np.int32(case.layer)


@functools.partial(
    jax.jit, static_argnames=("config", "kv_layout", "selector"), compiler_options=UNOPTIMIZED
)
def attend(query, cache, counts, layer, soft_cap, *, config, kv_layout, selector):
    """A selection and attention over it."""
    selection = select(
        query, cache.index, config, counts=counts, layer=layer, return_rest=True,
        logits_soft_cap=soft_cap, implementation="xla", selector=selector,
    )  # fmt: skip
    return sparse_attention(
        query, cache.key, cache.value, selection, config=config, rest=selection.rest, layer=layer,
        logits_soft_cap=soft_cap, return_lse=True, kv_layout=kv_layout, implementation="xla",
    )  # fmt: skip


def attend_by_kernels(
    query, cache, counts, scale, soft_cap, layer, *, config, selector, kv_layout, tuning
):
    T, N = query.shape[1:3]
    step = Step.of(cache.index, config, T=T, N=N, kv_layout=kv_layout, tuning=tuning)
    logits, caches = Logits(scale, soft_cap), Caches(cache.key, cache.value)
    found = pipeline.launch_select(
        step, query, cache.index, counts, selector, layer, rest_by=logits
    )
    assert isinstance(found, Selection)
    ended = launch_listed(
        query, caches, found.indices, logits, layer, kv_layout, own=Entries.of(config),
        rest=found.rest, tuning=tuning,
    )  # fmt: skip
    return ended.output.out, ended.output.lse, found.rest


@pytest.mark.parametrize("option", ["codes", "mean"])
@pytest.mark.parametrize("name", CASES)
def test_the_output_is_that_of_a_decode_step(name, option):
    case = case_of(name, option)
    query, _, cache, counts = draw(case, 16)
    cache = with_sums(case, cache)
    soft_cap = np.float32(3) if case.counts else None
    arguments = jax.tree.map(jnp.asarray, (query, cache, counts))
    out, _ = attend(
        *arguments, of_layer(case), soft_cap, config=case.config, kv_layout=case.kv_layout,
        selector=None,
    )  # fmt: skip
    check(case, query, cache, counts, out, soft_cap=soft_cap)


# Of each kernel one case at the least; checked memory is slow.
INTERPRETED = {
    ("three query tokens", "codes"), ("plain", "mean"), ("cells", "codes"), ("no budget", "mean"),
    ("layers of cells, from the end", "mean"), ("cells of three query tokens", "codes"),
    ("cells, no budget", "codes"),
}  # fmt: skip
ON_CHECKED_MEMORY = {("cells", "codes"), ("the middle layer", "mean"), ("all sink", "codes")}


HERE = {"interpreted": INTERPRETED, "on_checked_memory": ON_CHECKED_MEMORY}


@pytest.mark.parametrize(
    ("runner", "name", "option"),
    [
        pytest.param(runner, name, option, id=f"{runner}-{name}-{option}", marks=marks)
        for name in CASES
        for option in ("codes", "mean")
        for runner, marks in RUNNERS.items()
        if is_run(runner, name, option, **HERE)
    ],
)
def test_kernels_do_it(runner, name, option):
    """Cut up small, and on a GPU as it is tuned too; masses are those of "xla"."""
    case, run = case_of(name, option), Runner(runner)
    query, _, cache, counts = draw(case, 4 if runner == "checked memory" else 16)
    cache = with_sums(case, cache)
    soft_cap = np.float32(3) if case.counts else None
    arguments = jax.tree.map(jnp.asarray, (query, cache, counts))
    by_xla = select(
        arguments[0], arguments[1].index, case.config, counts=arguments[2], layer=of_layer(case),
        return_rest=True, logits_soft_cap=soft_cap, implementation="xla",
    ).rest  # fmt: skip
    for tuning in (IN_PARTS, H100) if runner == "triton" else (IN_PARTS,):
        out, lse, rest = run(
            attend_by_kernels, query, cache, counts, np.float32(case.H**-0.5), soft_cap,
            of_layer(case), config=case.config, selector=case.selector,
            kv_layout=case.kv_layout, tuning=tuning,
        )  # fmt: skip
        check(case, query, cache, counts, out, soft_cap=soft_cap)
        assert not np.isnan(lse).any()
        for field in dataclasses.fields(by_xla):
            want = getattr(by_xla, field.name)
            got = getattr(rest, field.name)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5, err_msg=field.name)


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("option", ["codes", "mean"])
def test_hard_data_is_added_up(option, hard):
    case = Case(sizes=options(option))
    query, _, cache, _ = draw(case, 4)
    lengths = np.array([case.S - 1, 70, 20, 5], np.int32)
    cache = dataclasses.replace(cache, index=dataclasses.replace(cache.index, lengths=lengths))
    cache = jax.tree.map(lambda x: np.nan_to_num(x) if x.dtype == np.float32 else x, cache)
    with np.errstate(invalid="ignore"):
        cache = with_sums(case, HARD[hard](cache))
        out, _ = attend(
            *jax.tree.map(jnp.asarray, (query, cache)), None, None, None, config=case.config,
            kv_layout=case.kv_layout, selector=None,
        )  # fmt: skip
        # Masses are logs in float32: of 1e4 they are off by 2**-11.
        check(case, query, cache, None, out, tolerance=2**-11 if "huge" in hard else None)


def test_gradients_take_the_rest_for_a_constant():
    """Those of the output with the rest as a part of its own, and finite where nothing is left."""
    case = Case(sizes=options("codes"))
    query, _, cache, _ = draw(case, 4)
    cache = jax.tree.map(jnp.asarray, with_sums(case, cache))
    clean = [jnp.nan_to_num(x) for x in (query, cache.key, cache.value)]
    found = select(clean[0], cache.index, case.config, return_rest=True, implementation="xla")

    def loss(query, key, value, rest):
        out, lse = sparse_attention(
            query, key, value, found, config=case.config, rest=rest, return_lse=True,
            implementation="xla",
        )  # fmt: skip
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isneginf(lse), 0, lse))

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(*clean, found.rest)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert not any(np.any(x) for x in jax.tree.leaves(gradients[3]))
    # Each gradient against a difference, where the rest's part does not move by itself.
    apart = sparse_attention(
        *clean, found, config=case.config, return_lse=True, implementation="xla"
    )
    with_rest = sparse_attention(
        *clean, found, config=case.config, rest=found.rest, return_lse=True, implementation="xla"
    )
    mass = np.exp(np.float64(with_rest[1])) - np.exp(np.float64(apart[1]))

    def by_parts(query, key, value):
        out, lse = sparse_attention(
            query, key, value, found, config=case.config, return_lse=True, implementation="xla"
        )
        listed = jnp.exp(lse)
        total = listed + jnp.float32(mass)
        merged = out * listed[..., None] + found.rest.value * jnp.float32(mass)[..., None]
        merged = merged / jnp.where(total == 0, 1, total)[..., None]
        lse = jnp.log(jnp.where(total == 0, 1, total))
        return jnp.sum(merged**2) + jnp.sum(lse)

    want = jax.grad(by_parts, argnums=(0, 1, 2))(*clean)
    for got, one in zip(gradients, want, strict=False):
        np.testing.assert_allclose(got, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_rest": 1}, "return_rest"),
        ({"return_rest": True}, "return_rest: expected False with config.estimate_rest=False"),
        ({"scale": 1.0}, "scale: expected None without return_rest"),
        ({"logits_soft_cap": 1.0}, "logits_soft_cap: expected None without return_rest"),
    ],
)
def test_a_rest_that_cannot_be_is_refused(options, message):
    case = Case(sizes=sizes())
    query, _, cache, _ = draw(case, 2)
    with pytest.raises(ValueError, match=message):
        select(query, cache.index, case.config, **options)


def test_a_rest_that_does_not_belong_is_refused():
    case = Case(sizes=options("mean"))
    query, _, cache, _ = draw(case, 2)
    cache = jax.tree.map(jnp.asarray, with_sums(case, cache))
    found = select(query, cache.index, case.config, return_rest=True, implementation="xla")
    arrays = query, cache.key, cache.value, found
    with pytest.raises(ValueError, match="config: expected an IndexerConfig with a rest"):
        sparse_attention(*arrays, rest=found.rest)
    with pytest.raises(ValueError, match="rest: expected a Rest, got Selection"):
        sparse_attention(*arrays, rest=found, config=case.config)
    other = dataclasses.replace(found.rest, log_mass=found.rest.log_mass[:, :, :1])
    with pytest.raises(ValueError, match=r"rest\.log_mass: expected"):
        sparse_attention(*arrays, rest=other, config=case.config)
