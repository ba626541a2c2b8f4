"""The functions inside jit, vmap, scan and shard_map."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_indexer import (
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
from jax_indexer.kernels import append as append_kernels
from jax_indexer.kernels import backend
from parity import test_layers as layered
from parity.inputs import SMALL, make_inputs

WORKLOAD = SMALL["small-grouped"]
CONFIG = WORKLOAD.config


def arrays(*, seed=0, steps=1):
    """Integers, so that every way to compute them gives the same bits."""
    rng = np.random.default_rng(seed)
    inputs = make_inputs(WORKLOAD, integers=3)
    codes = rng.integers(0, 32, inputs.codes.shape, np.uint8)
    index = PQIndex(
        codebooks=jnp.asarray(inputs.codebooks, jnp.float32),
        codes=jnp.asarray(codes),
        lengths=jnp.asarray(inputs.lengths - 20),
    )

    def draw(*shape):
        return jnp.asarray(rng.integers(-3, 4, shape), jnp.float32)

    w = WORKLOAD
    query, key_new = draw(steps, w.B, 1, w.N, w.H), draw(steps, w.B, 1, w.K, w.H)
    cache = draw(w.B, w.capacity, w.K, w.H)
    return index, query, key_new, cache


def check_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_state_is_a_pytree():
    index = arrays()[0]
    leaves, structure = jax.tree.flatten(index)
    assert len(leaves) == 3  # None is no leaf
    check_same(jax.tree.unflatten(structure, leaves), index)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(index)]
    assert paths == [".codebooks", ".codes", ".lengths"]


def test_selections_are_a_pytree_too(implementation):
    """Which keeps what is static of the index they were made from."""
    index, query, _, _ = arrays()
    selection = jax.jit(lambda q, i: select(q, i, CONFIG, implementation=implementation))(
        query[0], index
    )
    assert isinstance(selection, Selection)
    assert len(jax.tree.leaves(selection)) == 2
    assert selection.capacity == WORKLOAD.capacity
    assert jax.tree.map(lambda x: x, selection).capacity == WORKLOAD.capacity


def test_jit_gives_what_eager_calls_give(implementation):
    index, query, key_new, cache = arrays()
    selecting = {"return_weights": True, "implementation": implementation}
    for function, arguments, options in (
        (select, (query[0], index, CONFIG), selecting),
        (indexer_next, (query[0], key_new[0], index, CONFIG), selecting),
        (append, (index, key_new[0], CONFIG), {}),
    ):
        want = function(*arguments, **options)
        got = jax.jit(function, static_argnames=["config", *options])(*arguments, **options)
        check_same(got, want)
    selection = select(query[0], index, CONFIG)
    want = sparse_attention(query[0], cache, cache, selection)
    got = jax.jit(sparse_attention)(query[0], cache, cache, selection)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_build_index_under_jit():
    """Training is float arithmetic, so only what is given codebooks is exact."""
    cache = arrays()[3]
    lengths = jnp.asarray([256, 130], jnp.int32)
    index = jax.jit(build_index, static_argnames="config")(cache, lengths, config=CONFIG)
    want = append(
        PQIndex(
            codebooks=index.codebooks,
            codes=jnp.zeros_like(index.codes),
            lengths=jnp.zeros_like(index.lengths),
        ),
        cache,
        CONFIG,
    )
    np.testing.assert_array_equal(index.codes[0], want.codes[0])
    np.testing.assert_array_equal(index.codes[1, ..., :130], want.codes[1, ..., :130])


def stacked():
    many = [arrays(seed=seed) for seed in range(3)]
    return many, jax.tree.map(lambda *x: jnp.stack(x), *many)


def test_vmap_over_a_leading_axis(implementation):
    """Three models, say, side by side."""
    many, (index, query, key_new, cache) = stacked()

    def step(query, key_new, index, cache):
        selection, index = indexer_next(
            query[0], key_new[0], index, CONFIG, return_weights=True, implementation=implementation
        )
        return selection, index, sparse_attention(query[0], cache, cache, selection)

    got = jax.jit(jax.vmap(step))(query, key_new, index, cache)
    for i, (index, query, key_new, cache) in enumerate(many):
        *exact, attended = jax.tree.map(lambda x, i=i: x[i], got)
        *want, want_attended = step(query, key_new, index, cache)
        check_same(exact, want)
        np.testing.assert_allclose(attended, want_attended, rtol=1e-6, atol=1e-6)


def test_vmap_over_queries_alone(implementation):
    """One index, several queries: in_axes leaves the state unbatched."""
    index = arrays()[0]
    query = arrays(steps=4)[1]
    run = functools.partial(select, implementation=implementation)
    got = jax.vmap(lambda q: run(q, index, CONFIG))(query)
    for i in range(4):
        check_same(jax.tree.map(lambda x, i=i: x[i], got), run(query[i], index, CONFIG))


def test_vmap_of_build_index_and_append():
    many, (index, _, key_new, cache) = stacked()
    # No integers: assignments that are ties would go by the rounding of a matrix product.
    cache = jax.random.normal(jax.random.key(0), cache.shape)
    grown = jax.vmap(lambda i, k: append(i, k[0], CONFIG))(index, key_new)
    lengths = jnp.asarray([256, 130], jnp.int32)
    built = jax.vmap(lambda k: build_index(k, lengths, CONFIG))(cache)
    for i, (index, _, key_new, _) in enumerate(many):
        check_same(jax.tree.map(lambda x, i=i: x[i], grown), append(index, key_new[0], CONFIG))
        alone = build_index(cache[i], lengths, CONFIG)
        np.testing.assert_allclose(built.codebooks[i], alone.codebooks, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(built.lengths[i], alone.lengths)


@pytest.mark.parametrize("unroll", [1, 2])
def test_scan_gives_what_steps_give(unroll, implementation):
    index, query, key_new, _ = arrays(steps=12)

    def step(index, x):
        selection, index = indexer_next(
            *x, index, CONFIG, return_weights=True, implementation=implementation
        )
        return index, selection

    last, selections = jax.jit(lambda *a: lax.scan(step, *a, unroll=unroll))(
        index, (query, key_new)
    )
    for t in range(12):
        index, want = step(index, (query[t], key_new[t]))
        check_same(jax.tree.map(lambda x, t=t: x[t], selections), want)
    check_same(last, index)


def test_a_step_inside_cond(implementation):
    index, query, key_new, _ = arrays()

    @jax.jit
    def maybe(flag, index):
        def step(index):
            return indexer_next(query[0], key_new[0], index, CONFIG, implementation=implementation)[
                1
            ]

        return lax.cond(flag, step, lambda index: index, index)

    check_same(maybe(False, index), index)
    check_same(maybe(True, index), append(index, key_new[0], CONFIG))


def test_abstract_evaluation_needs_no_data():
    index, query, key_new, _ = arrays()
    shapes = jax.eval_shape(
        lambda *a: indexer_next(*a, CONFIG, return_weights=True), query[0], key_new[0], index
    )
    got = indexer_next(query[0], key_new[0], index, CONFIG, return_weights=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), got
    )


SHARDED = """
import dataclasses
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jax_indexer import IndexerConfig, PQIndex, build_index, indexer_next, sparse_attention

B, K, G, H, S, M, bits = 4, 4, 2, 8, 96, 2, 4
config = IndexerConfig(num_subspaces=M, num_bits=bits, heavy_size=9, sink_size=4, window_size=4)
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.integers(-3, 4, shape), jnp.float32)
key, query, key_new = draw(B, S, K, H), draw(B, 1, K * G, H), draw(B, 1, K, H)
lengths = jnp.asarray([S - 1, 50, 20, 0], jnp.int32)
index = PQIndex(
    codebooks=draw(B, K, M, 2**bits, H // M),
    codes=jnp.asarray(rng.integers(0, 2**bits, (B, K, M, S)), jnp.uint8),
    lengths=lengths,
)

def step(query, key_new, index, key):
    selection, index = indexer_next(query, key_new, index, config, return_weights=True)
    return selection, index, sparse_attention(query, key, key, selection)

def split(axes_of_batch, axes_of_heads):
    b, k = axes_of_batch, axes_of_heads
    heads = P(b, None, k)
    state = PQIndex(codebooks=P(b, k), codes=P(b, k), lengths=P(b))
    return (heads, heads, state, heads), (heads, state, heads)

want = step(query, key_new, index, key)
assert len(jax.devices()) == 4
report = []
for shape, batch, heads in (((4, 1), "b", None), ((1, 4), None, "k"), ((2, 2), "b", "k")):
    mesh = Mesh(np.asarray(jax.devices()).reshape(shape), ("b", "k"))
    ins, outs = split(batch, heads)
    got = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=ins, out_specs=outs))(
        query, key_new, index, key
    )
    assert jax.tree.structure(got) == jax.tree.structure(want)
    *exact, attended = jax.tree.leaves(got)
    *want_exact, want_attended = jax.tree.leaves(want)
    for a, b in zip(exact, want_exact, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(attended, want_attended, rtol=1e-6, atol=1e-6)
    report.append([len(x.sharding.device_set) for x in jax.tree.leaves(got)])

    if batch and heads:
        # The same without shard_map: the compiler partitions what it is given.
        placed = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
            (query, key_new, index, key), ins,
        )
        *exact, attended = jax.tree.leaves(jax.jit(step)(*placed))
        for a, b in zip(exact, want_exact, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(attended, want_attended, rtol=1e-6, atol=1e-6)
    elif batch:
        # Training, batch rows apart; a shard's heads are numbered from 0, so not over heads.
        with_rest = dataclasses.replace(config, estimate_rest="codes")
        build = lambda key, lengths: build_index(key, lengths, with_rest, value=key)
        apart = jax.shard_map(build, mesh=mesh, in_specs=(P("b"), P("b")), out_specs=P("b"))
        trained, alone = jax.jit(apart)(key, lengths), build(key, lengths)
        np.testing.assert_array_equal(trained.lengths, alone.lengths)
        np.testing.assert_allclose(trained.codebooks, alone.codebooks, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(trained.values.counts, alone.values.counts)
        np.testing.assert_array_equal(trained.values.sums, alone.values.sums)
print(json.dumps(report))
"""


def test_shard_map_over_batch_and_heads():
    """On four host devices, in a process of its own: their number is fixed when JAX starts."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(count == 4 for row in json.loads(done.stdout) for count in row)


@pytest.mark.parametrize("axis_types", ["Explicit", "Auto"])
def test_arrays_on_meshes(axis_types):
    """`parity.meshes` on four host devices, whose number is fixed when JAX starts."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of it
    }
    command = [sys.executable, "-W", "error", "-m", "parity.meshes", axis_types]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("checked") == {"Explicit": 6, "Auto": 5}[axis_types]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_nothing_survives_a_trace_that_was_interrupted(stop, monkeypatch):
    """As by Ctrl-C in the seconds that a first call takes."""
    index, _, key_new, _ = arrays()
    want = append(index, key_new[0], CONFIG)

    def interrupted(*arguments):
        raise stop

    jax.clear_caches()
    with monkeypatch.context() as patch, backend.interpreted():
        patch.setattr(append_kernels, "tiles", interrupted)
        with pytest.raises(stop):
            append(index, key_new[0], CONFIG)
    check_same(append(index, key_new[0], CONFIG), want)
    with backend.interpreted():
        check_same(append(index, key_new[0], CONFIG), want)


def test_64_bit_mode_changes_nothing(implementation):
    index, query, key_new, _ = arrays()
    options = {"return_weights": True, "implementation": implementation}
    want = indexer_next(query[0], key_new[0], index, CONFIG, **options)
    with jax.enable_x64(True):
        got = indexer_next(query[0], key_new[0], index, CONFIG, **options)
    check_same(got, want)


def test_64_bit_mode_trains_the_same_codebooks():
    cache, lengths = arrays()[3], jnp.asarray([256, 130], jnp.int32)
    want = build_index(cache, lengths, CONFIG)
    gain = rebuild_gain(want, cache, CONFIG)
    with jax.enable_x64(True):
        got = build_index(cache, lengths, CONFIG)
        check_same(rebuild_gain(got, cache, CONFIG), gain)
        check_same(reset(got, lengths == 0), got)
    check_same(got, want)


def test_64_bit_mode_lets_the_best_implementation_be_chosen():
    index, query, _, _ = arrays()
    with jax.enable_x64(True):
        assert select(query[0], index, CONFIG).indices.dtype == jnp.int32


@pytest.mark.parametrize("cells", [False, True], ids=["without cells", "with cells"])
@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_eager_calls_transfer_nothing_unasked_and_promote_no_ranks(metric, cells):
    """All arrays are on the device; a seed and a scale go there by explicit transfers."""
    config = IndexerConfig(
        num_bits=2, heavy_size=4, sink_size=2, window_size=3, metric=metric, cells=cells
    )
    cache = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 2, 8)), jnp.float32)
    lengths, rows = jnp.asarray([50, 40], jnp.int32), jnp.asarray([True, False])
    query, key_new, counts = jnp.repeat(cache[:, :3], 2, axis=2), cache[:, :3], lengths // 20
    jax.block_until_ready((cache, lengths, rows, query, key_new, counts))
    with jax.transfer_guard("disallow"), jax.numpy_rank_promotion("raise"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
            jax.block_until_ready(lengths + 1)  # or the guard would not see anything
        index = build_index(cache, lengths, config, seed=3)
        index = append(index, key_new, config, counts=counts)
        selection, index = indexer_next(query, key_new, index, config)
        gain = rebuild_gain(index, cache, config)
        index = rebuild(reset(index, rows), cache, config, rows, lengths=lengths, seed=3)
        index = with_cells(index, config) if cells else index
        selected = select(query, index, config, return_weights=True)
        out = sparse_attention(query, cache, cache, selection)
        scaled = sparse_attention(query, cache, cache, selected, scale=0.5)
        jax.block_until_ready((index, gain, out, scaled))


@pytest.mark.parametrize("layer", [None, 1, jnp.int32(1)], ids=repr)
def test_the_life_of_a_cache_transfers_nothing_unasked_and_promotes_no_ranks(layer):
    config = layered.PLAIN if layer is None else layered.CELLS
    key, value, lengths = layered.prompts()
    rows, x = jnp.asarray(layered.ROWS), layered.step_inputs()
    sizes = layered.B, layered.S, layered.K, layered.H
    layers = None if layer is None else layered.LAYERS
    of_layer = {} if layer is None else {"layer": layer}
    jax.block_until_ready((key, value, lengths, rows, x))
    with jax.transfer_guard("disallow"), jax.numpy_rank_promotion("raise"):
        cache = empty_cache(
            config, *sizes, value_head_dim=layered.VALUE_H, dtype=jnp.float32, layers=layers
        )
        cache = prefill(key, value, lengths, config, cache=cache, **of_layer)
        cache = prefill(key, value, lengths, config, cache=cache, rows=rows, **of_layer)
        out, cache = decode_attention(
            **x, cache=cache, config=config, scale=0.5, logits_soft_cap=9, **of_layer
        )
        index = append(cache.index, x["key_new"], config, **of_layer)
        selection, index = indexer_next(x["query"], x["key_new"], index, config, **of_layer)
        selection = select(x["query"], index, config, **of_layer)
        attended = sparse_attention(
            x["query"], cache.key, cache.value, selection, return_lse=True, **of_layer
        )
        gain = rebuild_gain(index, cache.key, config, **of_layer)
        index = rebuild(reset(index, rows, **of_layer), cache.key, config, rows, **of_layer)
        index = with_cells(index, config, **of_layer) if config.cells else index
        jax.block_until_ready((out, index, attended, gain))


def test_gradients_flow_around_the_selection():
    index, query, key_new, cache = arrays()

    def loss(query, key_new, selection=None):
        if selection is None:
            selection, _ = indexer_next(query, key_new, index, CONFIG, return_weights=True)
        return sparse_attention(query, cache, cache, selection).sum()

    selection, _ = indexer_next(query[0], key_new[0], index, CONFIG)
    through = jax.grad(loss, argnums=(0, 1))(query[0], key_new[0])
    around = jax.grad(loss)(query[0], key_new[0], selection)
    np.testing.assert_array_equal(through[0], around)
    assert not through[1].any()


# Attention and its gradients, by kernels in the interpreter as by XLA.


def attention_inputs():
    """Caches of several layers with NaN where nothing is listed, and lists, one of them empty."""
    rng = np.random.default_rng(0)
    L, B, N, K, S = layered.LAYERS, layered.B, layered.N, layered.K, layered.S
    indices = np.full((B, 1, N, 7), -1, np.int32)
    indices[..., :5] = [1, 4, 9, 20, S - 2]
    indices[0, 0, 2] = -1
    query = rng.standard_normal((B, 1, N, layered.H)).astype(np.float32)
    key = rng.standard_normal((L, B, S, K, layered.H)).astype(np.float32)
    value = rng.standard_normal((L, B, S, K, layered.VALUE_H)).astype(np.float32)
    unlisted = np.setdiff1d(np.arange(S), indices)
    key[:, :, unlisted] = value[:, :, unlisted] = np.nan
    counts = (indices >= 0).sum(-1, dtype=np.int32)
    selection = Selection(jnp.asarray(indices), jnp.asarray(counts))
    return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), selection


def attention_loss(selection, implementation, **options):
    """Of outputs, and of what they weigh, through which gradients flow too."""

    def loss(query, key, value, scale, soft_cap):
        found = sparse_attention(
            query,
            key,
            value,
            selection,
            scale=scale,
            logits_soft_cap=soft_cap,
            implementation=implementation,
            **options,
        )
        if not options.get("return_lse"):
            return jnp.sum(found**2)
        out, lse = found
        return jnp.sum(out**2) + jnp.sum(jnp.exp(lse))

    return loss


@pytest.mark.parametrize("return_lse", [False, True], ids=["output", "output and lse"])
@pytest.mark.parametrize("layer", [None, 2], ids=["one layer", "stacked layers"])
def test_kernels_have_the_gradients_of_xla(layer, return_lse):
    query, key, value, selection = attention_inputs()
    if layer is None:
        key, value = key[0], value[0]
    arguments = query, key, value, jnp.float32(0.4), jnp.float32(2.5)
    options = {"layer": layer, "return_lse": return_lse}
    found = {}
    with backend.interpreted():
        for implementation in ("xla", "triton"):
            loss = attention_loss(selection, implementation, **options)
            found[implementation] = jax.jit(jax.value_and_grad(loss, range(5)))(*arguments)
    (want_loss, want), (got_loss, got) = found["xla"], found["triton"]
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-6)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert jnp.isfinite(one).all()
        assert (one != 0).any()
    of_query, of_key, of_value = got[:3]
    assert (of_query[0, 0, 2] == 0).all()
    for gradient, array in ((of_key, key), (of_value, value)):
        assert (gradient[jnp.isnan(array)] == 0).all()
        if layer is not None:
            assert (np.delete(gradient, layer, axis=0) == 0).all()


def test_gradients_by_xla_are_those_of_finite_differences():
    query, key, value, selection = attention_inputs()
    loss = attention_loss(selection, "xla", return_lse=True, layer=1)
    key, value = jnp.nan_to_num(key), jnp.nan_to_num(value)
    arguments = query, key, value, jnp.float32(0.4), jnp.float32(2.5)
    gradients = jax.grad(loss, range(5))(*arguments)
    for place, gradient in enumerate(gradients):
        direction = jax.random.normal(jax.random.key(place), arguments[place].shape) / 8
        step = 1e-2

        def along(sign, place=place, direction=direction, step=step):
            moved = list(arguments)
            moved[place] += sign * step * direction
            return loss(*moved)

        numeric = (along(1.0) - along(-1.0)) / (2 * step)
        np.testing.assert_allclose(jnp.sum(gradient * direction), numeric, rtol=2e-2, atol=1e-3)


def test_xla_has_forward_mode_too():
    query, key, value, selection = attention_inputs()
    loss = attention_loss(selection, "xla", return_lse=True)
    arguments = query, jnp.nan_to_num(key[0]), jnp.nan_to_num(value[0])
    arguments = (*arguments, jnp.float32(0.4), jnp.float32(2.5))
    tangents = jax.tree.map(jnp.ones_like, arguments)
    _, forward = jax.jvp(loss, arguments, tangents)
    gradients = jax.grad(loss, range(5))(*arguments)
    backward = sum(jnp.sum(gradient) for gradient in gradients)
    np.testing.assert_allclose(forward, backward, rtol=1e-4)


def test_gradients_of_what_vmap_maps():
    """Lists of its own for each, and the caches in common."""
    query, key, value, selection = attention_inputs()
    indices = jnp.stack([selection.indices, jnp.flip(selection.indices, axis=2)])
    queries = jnp.stack([query, -query])

    def loss(query, indices, implementation):
        lists = Selection(indices, selection.counts)
        return attention_loss(lists, implementation, layer=1)(
            query, key, value, jnp.float32(0.4), jnp.float32(2.5)
        )

    with backend.interpreted():
        by_kernels = jax.grad(functools.partial(loss, implementation="triton"))
        got = jax.jit(jax.vmap(by_kernels))(queries, indices)
    for i in range(2):
        want = jax.grad(functools.partial(loss, implementation="xla"))(queries[i], indices[i])
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mapped", "name"),
    [
        ("all", "xla, inner product, cells"),
        ("queries", "xla"),
        ("layers", "xla"),
        ("all", "kernels"),
        ("layers", "kernels, inner product, cells"),
    ],
)
def test_vmap_of_decode_attention(mapped, name):
    """Over everything, over queries for one cache, and over the layers of one cache."""
    case = layered.CASES[name]
    cache, x = layered.stacked_cache(case.config), layered.step_inputs()
    queries = jnp.stack([x["query"], 1 - x["query"]])
    layers = jnp.asarray([2, 0], jnp.int32)
    caches = jax.tree.map(lambda x: jnp.stack([x, jnp.flip(x, axis=0)]), cache)
    if case.config.cells:
        again = [with_cells(jax.tree.map(lambda x, i=i: x[i], caches.index), case.config)
                 for i in range(2)]  # fmt: skip
        index = jax.tree.map(lambda *x: jnp.stack(x), *again)
        caches = dataclasses.replace(caches, index=index)
    axes = {"all": (0, 0, 0), "queries": (0, None, None), "layers": (None, None, 0)}[mapped]
    arguments = queries, caches, layers
    arguments = [
        whole if axis == 0 else one
        for axis, whole, one in zip(axes, arguments, (queries[0], cache, layers[1]), strict=True)
    ]

    def step(query, cache, layer):
        return decode_attention(
            query,
            x["key_new"],
            x["value_new"],
            cache,
            case.config,
            layer=layer,
            implementation=case.implementation,
            selector=case.selector,
        )

    with case.runs():
        got = jax.jit(jax.vmap(step, axes))(*arguments)
        one = jax.jit(step)
        for i in range(2):
            own = [
                jax.tree.map(lambda x, i=i: x[i], x) if axis == 0 else x
                for axis, x in zip(axes, arguments, strict=True)
            ]
            out, state = jax.tree.map(lambda x, i=i: x[i], got)
            want, want_state = one(*own)
            check_same(state, want_state)
            np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)


def test_a_donated_scan_of_decode_steps_gives_what_eager_steps_give():
    case, steps = layered.CASES["xla, inner product, cells"], 5
    cache, x = layered.stacked_cache(case.config), layered.step_inputs()
    queries = layered.draw(steps, *x["query"].shape, seed=11)
    options = {"config": case.config, "layer": 1, "implementation": case.implementation}

    def step(cache, query):
        out, cache = decode_attention(query, x["key_new"], x["value_new"], cache, **options)
        return cache, out

    want, outputs = cache, []
    for query in queries:
        want, out = step(want, query)
        outputs.append(out)
    run = jax.jit(lambda cache, queries: lax.scan(step, cache, queries), donate_argnums=0)
    given = jax.tree.map(jnp.copy, cache)
    place = given.key.unsafe_buffer_pointer()
    after, got = run(given, queries)
    assert given.key.is_deleted()
    assert after.key.unsafe_buffer_pointer() == place
    check_same(after, want)
    np.testing.assert_allclose(got, jnp.stack(outputs), rtol=1e-6, atol=1e-6)
    assert after.index.lengths[1].tolist() == (layered.LENGTHS[1] + [0, steps]).tolist()
