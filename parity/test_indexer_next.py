"""indexer_next is append, then select."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import PQIndex, append, build_index, indexer_next, select
from parity import oracle
from parity.inputs import SMALL, make_inputs


def start(workload, inputs):
    """The index before the step."""
    return PQIndex(
        codebooks=jnp.asarray(inputs.codebooks),
        codes=jnp.asarray(inputs.codes),
        lengths=jnp.asarray(np.maximum(inputs.lengths - workload.T, 0)),
        phi=None if inputs.phi is None else jnp.asarray(inputs.phi),
    )


def check_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", SMALL)
def test_a_step_is_append_then_select(name, implementation):
    workload = SMALL[name]
    inputs = make_inputs(workload, integers=3)
    query, key_new = jnp.asarray(inputs.query), jnp.asarray(inputs.key_new)
    index, config = start(workload, inputs), workload.config
    options = {"return_weights": workload.weights, "implementation": implementation}
    selection, after = indexer_next(query, key_new, index, config, **options)
    want = append(index, key_new, config)
    check_same(after, want)
    check_same(selection, select(query, want, config, **options))


@pytest.mark.parametrize("name", ["small", "small-grouped", "small-three-queries"])
def test_a_step_equals_the_oracle(name, implementation):
    """Codes and lists, from small integers: nothing in between is taken from the library."""
    workload = SMALL[name]
    inputs = make_inputs(workload, integers=3)
    selection, after = indexer_next(
        jnp.asarray(inputs.query),
        jnp.asarray(inputs.key_new),
        start(workload, inputs),
        workload.config,
        implementation=implementation,
    )
    codes = inputs.codes.copy()
    new, _ = oracle.encode(inputs.key_new, inputs.codebooks)
    lengths = np.maximum(inputs.lengths - workload.T, 0) + workload.T
    for b, length in enumerate(lengths):
        codes[b, ..., length - workload.T : length] = new[b]
    np.testing.assert_array_equal(after.lengths, lengths)
    for b, length in enumerate(lengths):
        np.testing.assert_array_equal(after.codes[b, ..., :length], codes[b, ..., :length])
    table = oracle.rounded(
        oracle.exact_table(inputs.query, inputs.codebooks), workload.config.table_dtype
    )
    indices, counts, _ = oracle.select(table, codes, lengths, workload.config)
    np.testing.assert_array_equal(selection.indices, indices)
    np.testing.assert_array_equal(selection.counts, counts)


def test_the_new_token_is_seen_at_once():
    """It is in the window, and with no window the short rule or its score can take it."""
    workload = SMALL["small"]
    inputs = make_inputs(workload, integers=3)
    selection, after = indexer_next(
        jnp.asarray(inputs.query),
        jnp.asarray(inputs.key_new),
        start(workload, inputs),
        workload.config,
    )
    assert after.lengths.tolist() == [200, 200]
    last = np.asarray(selection.counts)[..., None] - 1
    assert (np.take_along_axis(np.asarray(selection.indices), last, -1) == 199).all()


def test_a_full_row_selects_from_what_it_has():
    workload = SMALL["small"]
    inputs = make_inputs(workload, integers=3)
    index = PQIndex(
        codebooks=jnp.asarray(inputs.codebooks),
        codes=jnp.asarray(inputs.codes),
        lengths=jnp.asarray([256, 100], jnp.int32),
    )
    query = jnp.asarray(inputs.query)
    selection, after = indexer_next(query, jnp.asarray(inputs.key_new), index, workload.config)
    assert after.lengths.tolist() == [256, 101]
    np.testing.assert_array_equal(after.codes[0], index.codes[0])
    check_same(
        jax.tree.map(lambda x: x[0], selection),
        jax.tree.map(lambda x: x[0], select(query, index, workload.config)),
    )


def padded_step(workload, inputs, implementation, counts, lengths):
    """A step of which each row takes `counts` tokens, and the oracle's lists."""
    index = PQIndex(
        codebooks=jnp.asarray(inputs.codebooks),
        codes=jnp.asarray(inputs.codes),
        lengths=jnp.asarray(lengths, jnp.int32),
    )
    got, after = indexer_next(
        jnp.asarray(inputs.query), jnp.asarray(inputs.key_new), index, workload.config,
        counts=jnp.asarray(counts, jnp.int32), return_weights=True, implementation=implementation,
    )  # fmt: skip
    capacity = index.codes.shape[-1]
    taken = np.clip(counts, 0, workload.T)
    taken = np.where(lengths + taken <= capacity, taken, 0)
    codes, (new, _) = inputs.codes.copy(), oracle.encode(inputs.key_new, inputs.codebooks)
    for b, (length, count) in enumerate(zip(lengths, taken, strict=True)):
        codes[b, ..., length : length + count] = new[b, ..., :count]
    np.testing.assert_array_equal(after.lengths, lengths + taken)
    exact = oracle.exact_table(inputs.query, inputs.codebooks)
    table = oracle.rounded(exact, workload.config.table_dtype)
    want = oracle.select(table, codes, lengths + taken, workload.config, taken)
    for one, other in zip((got.indices, got.counts, got.weights), want, strict=True):
        np.testing.assert_array_equal(one, other)
    return got, after


@pytest.mark.parametrize("counts", [(0, 1), (2, 3), (7, -1), (1, 0)])
@pytest.mark.parametrize("name", ["small", "small-three-queries"])
def test_query_tokens_belong_to_the_new_tokens_of_their_numbers(name, counts, implementation):
    """And what a row does not take is padding, with empty lists."""
    workload = SMALL[name]
    inputs = make_inputs(workload, integers=3)
    lengths = np.maximum(inputs.lengths - workload.T, 0)
    padded_step(workload, inputs, implementation, np.array(counts), lengths)


def test_a_row_that_would_pass_the_capacity_takes_nothing_and_lists_nothing(implementation):
    workload = SMALL["small-three-queries"]
    inputs = make_inputs(workload, integers=3)
    capacity = inputs.codes.shape[-1]
    lengths = np.array([capacity - 2, capacity - 3])
    got, after = padded_step(workload, inputs, implementation, np.array([3, 3]), lengths)
    assert after.lengths.tolist() == [capacity - 2, capacity]
    assert not np.asarray(got.counts[0]).any()
    assert np.asarray(got.counts[1]).all()


def test_a_row_of_a_padded_step_sees_what_it_sees_alone(implementation):
    """One of three tokens, beyond every size that depends on how many there are."""
    workload = SMALL["small-three-queries"]
    inputs = make_inputs(workload, integers=3)
    lengths = np.full(workload.B, 200)
    padded, after = padded_step(workload, inputs, implementation, np.ones(2, int), lengths)
    alone = select(
        jnp.asarray(inputs.query[:, :1]), after, workload.config, implementation=implementation
    )
    P = alone.indices.shape[-1]
    np.testing.assert_array_equal(padded.counts[:, :1], alone.counts)
    np.testing.assert_array_equal(padded.indices[:, :1, :, :P], alone.indices)


def test_both_layouts():
    workload = SMALL["small-three-queries"]
    inputs = make_inputs(workload, integers=3)
    query, key_new = jnp.asarray(inputs.query), jnp.asarray(inputs.key_new)
    index = start(workload, inputs)
    want = indexer_next(query, key_new, index, workload.config)
    check_same(indexer_next(query, key_new, index, workload.config, kv_layout="BSKH"), want)
    head_major = key_new.swapaxes(1, 2)
    check_same(indexer_next(query, head_major, index, workload.config, kv_layout="BKSH"), want)


def test_decoding_from_a_built_index():
    """Prefill, then twenty steps: every list equals the oracle's on the library's own codebooks."""
    workload = SMALL["small-grouped"]
    config, steps = workload.config, 20
    rng = np.random.default_rng(0)
    B, S, K, N, H = workload.B, workload.capacity, workload.K, workload.N, workload.H
    key = jnp.asarray(rng.integers(-3, 3, (B, S, K, H)).astype(np.float32))
    lengths = np.array([150, 61], np.int32)
    index = build_index(key, jnp.asarray(lengths), config)
    # Centroids rounded to sixteenths, so that tables and distances are exact.
    index = PQIndex(
        codebooks=jnp.round(index.codebooks * 16) / 16,
        codes=index.codes,
        lengths=index.lengths,
    )
    codebooks, codes = np.asarray(index.codebooks), np.asarray(index.codes).copy()
    for _ in range(steps):
        query = rng.integers(-3, 3, (B, 1, N, H)).astype(np.float32)
        key_new = rng.integers(-3, 3, (B, 1, K, H)).astype(np.float32)
        selection, index = indexer_next(jnp.asarray(query), jnp.asarray(key_new), index, config)
        new, _ = oracle.encode(key_new, codebooks)
        for b in range(B):
            codes[b, ..., lengths[b]] = new[b, ..., 0]
        lengths = lengths + 1
        table = oracle.rounded(oracle.exact_table(query, codebooks), config.table_dtype)
        indices, counts, _ = oracle.select(table, codes, lengths, config)
        np.testing.assert_array_equal(selection.indices, indices)
        np.testing.assert_array_equal(selection.counts, counts)
        np.testing.assert_array_equal(index.lengths, lengths)
    for b in range(B):
        np.testing.assert_array_equal(
            index.codes[b, ..., : lengths[b]], codes[b, ..., : lengths[b]]
        )
