"""Every kernel lowers for CUDA on a machine without a GPU, alone and under JAX's transformations.

This finds missing lowering rules, not what Triton itself would refuse: that takes a GPU.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    PQIndex,
    Rope,
    Selection,
    append,
    build_index,
    decode_attention,
    empty_cache,
    indexer_next,
    rebuild,
    rebuild_gain,
    select,
    sparse_attention,
    with_cells,
)
from parity.lowering import an_h100, lowered


def first_kernel(*, append=True, weights=False, seal=False):
    """The launch that a step begins with, by what it does beside look-up tables."""
    parts = [
        *["append_kernel"] * append,
        "lookup_table_kernel",
        *["always_attended_kernel"] * weights,
        *["seal_kernel"] * seal,
    ]
    return "_and_".join(parts)


COMMON = {first_kernel()}
KERNELS = {
    "threshold": {"group_maxima_kernel", "threshold_select_kernel"},
    "top_k": {"score_kernel", "count_kernel", "verify_cut_kernel", "sparse_index_kernel"},
}


def shaped(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def arguments(B=1, T=1, N=8, K=2, H=64, S=5000, dtype=jnp.float32, config=None, lead=()):
    """(query, key_new, index) of these shapes."""
    config = config or IndexerConfig()
    M, C, augmented = config.num_subspaces, config.num_centroids, config.metric == "ip"
    index = PQIndex(
        codebooks=shaped((*lead, B, K, M, C, H // M + augmented), dtype),
        codes=shaped((*lead, B, K, M, S), jnp.uint8),
        lengths=shaped((*lead, B), jnp.int32),
        phi=shaped((*lead, B, K, M), jnp.float32) if augmented else None,
    )
    query, key_new = (*lead, B, T, N, H), (*lead, B, T, K, H)
    return shaped(query, dtype), shaped(key_new, dtype), index


def kernels(text: str) -> set[str]:
    return set(re.findall(r'name = \\?"(\w+_kernel)', text))


CASES = {
    "seed": ({"N": 32, "K": 32, "H": 128, "S": 32000}, {}),
    "one subspace": ({"H": 256}, {"num_subspaces": 1, "num_bits": 8}),
    "many subspaces": ({"H": 64, "B": 3}, {"num_subspaces": 32, "num_bits": 8}),
    "one bit": ({"H": 32, "K": 1}, {"num_subspaces": 4, "num_bits": 1}),
    "odd sizes": (
        {"H": 96, "N": 15, "K": 3, "S": 777, "B": 2},
        {"num_subspaces": 3, "num_bits": 5, "heavy_size": 77, "sink_size": 3, "window_size": 0},
    ),
    "one token": ({"S": 1}, {}),
    "no budget": ({"S": 300}, {"heavy_size": 0, "sink_size": 0, "window_size": 0}),
    "several query tokens": ({"T": 3, "N": 6, "K": 3, "dtype": jnp.float16}, {"init_offset": 200}),
    "inner product": ({"dtype": jnp.bfloat16}, {"metric": "ip", "num_subspaces": 4}),
    "bfloat16 table": ({"H": 160}, {"table_dtype": jnp.bfloat16, "num_subspaces": 5}),
    "float16 table": ({"S": 1 << 20}, {"table_dtype": jnp.float16, "heavy_size": 4096}),
}


@pytest.mark.parametrize("weights", [False, True], ids=["lists", "weights"])
@pytest.mark.parametrize("selector", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_a_decode_step_lowers_to_kernels_alone(name, selector, weights):
    shape, sizes = CASES[name]
    config = IndexerConfig(**sizes)
    step = functools.partial(indexer_next, config=config, return_weights=weights, selector=selector)
    with an_h100():
        text = lowered(step, *arguments(**shape, config=config))
    assert kernels(text) == {first_kernel(weights=weights)} | KERNELS[selector]
    assert "f64" not in text
    assert "i64" not in re.sub(r'backend_config = "[^"]*"|: i64|: tensor<\d+xi64>', "", text)
    assert "stablehlo.sort" not in text  # the plain XLA form sorts its lists
    assert ("chlo.top_k" in text) == (selector == "top_k" and config.heavy_size > 0)


CELLS = {
    "seed": ({"N": 32, "K": 32, "H": 128, "S": 32000}, {}),
    "a million tokens": ({"S": 1 << 20, "dtype": jnp.bfloat16}, {"heavy_size": 2048}),
    "most cells": ({"S": 777, "B": 2}, {"num_bits": 7, "heavy_size": 77, "window_size": 0}),
    "one subspace": ({"S": 1}, {"num_subspaces": 1, "num_bits": 1}),
    "inner product": ({"dtype": jnp.float16}, {"metric": "ip", "num_subspaces": 4, "num_bits": 3}),
}


def arguments_with_cells(config, **shape):
    query, key_new, index = arguments(**shape, config=config)
    return query, key_new, jax.eval_shape(functools.partial(with_cells, config=config), index)


@pytest.mark.parametrize("weights", [False, True], ids=["lists", "weights"])
@pytest.mark.parametrize("name", CELLS)
def test_a_step_with_cells_is_two_kernels_and_asks_the_host_nothing(name, weights):
    shape, sizes = CELLS[name]
    config = IndexerConfig(cells=True, **sizes)
    options = {"config": config, "return_weights": weights, "selector": "cells"}
    options["implementation"] = "triton"  # None is a choice of the platform, made by compiling
    query, key_new, index = arguments_with_cells(config, **shape)
    with an_h100():
        step = functools.partial(indexer_next, **options)
        text = lowered(step, query, key_new, index, donate_argnums=2)
        again = lowered(functools.partial(select, **options), query, index)
    first = first_kernel(weights=weights, seal=True)
    assert kernels(text) == {first, "cells_select_kernel"}
    again_first = first_kernel(append=False, weights=weights)
    assert kernels(again) == {again_first, "cells_select_kernel"}
    assert not re.search(r"stablehlo\.(case|if|while|sort)", text + again)
    signature = text[text.index("@main(") : text.index("->", text.index("@main("))]
    assert len(re.findall(r"tf.aliasing_output|jax.buffer_donor", signature)) >= 5


def test_an_index_with_cells_is_searched_by_them_where_that_is_possible_and_faster():
    for capacity, tokens, changes, selector in (
        (32768, 1, {}, "cells"),
        (32767, 1, {}, "threshold"),
        (32768, 1, {"heavy_size": 1 << 15}, "threshold"),
        (32768, 8, {}, "cells"),
        (32768, 9, {}, "threshold"),
        (32768, 1, {"cells": False}, "threshold"),
        (32768, 1, {"num_subspaces": 4, "num_bits": 3}, "cells"),
        (32768, 1, {"num_bits": 7}, "threshold"),
        (32768, 1, {"table_dtype": jnp.bfloat16}, "threshold"),
    ):
        config = dataclasses.replace(IndexerConfig(cells=True), **changes)
        query, key_new, index = arguments(T=tokens, S=capacity, config=config)
        if config.cells:
            index = jax.eval_shape(functools.partial(with_cells, config=config), index)
        found = []
        for chosen in (None, selector):
            options = {"config": config, "implementation": "triton", "selector": chosen}
            with an_h100():
                step = lowered(functools.partial(indexer_next, **options), query, key_new, index)
                found.append((kernels(step), step.count("custom_call")))
        assert found[0] == found[1]
        assert any(selector in name for name in found[0][0])


@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_append_with_cells(tokens):
    config = IndexerConfig(cells=True)
    _, key_new, index = arguments_with_cells(config, T=tokens)
    with an_h100():
        text = lowered(functools.partial(append, config=config), index, key_new)
    sorts = tokens > 8
    assert kernels(text) == {"append_kernel" if sorts else "append_kernel_and_seal_kernel"}
    assert ("stablehlo.sort" in text) == sorts


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 500])
@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
@pytest.mark.parametrize("counts", [None, shaped((3,), jnp.int32)], ids=["all", "counts"])
def test_append_is_one_kernel(tokens, kv_layout, counts):
    config = IndexerConfig(num_subspaces=4)
    _, _, index = arguments(B=3, config=config)
    key_new = (3, tokens, 2, 64) if kv_layout == "BSKH" else (3, 2, tokens, 64)

    def run(index, key_new, counts):
        return append(index, key_new, config, counts=counts, kv_layout=kv_layout)

    with an_h100():
        text = lowered(run, index, shaped(key_new, jnp.float32), counts)
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1
    assert kernels(text) == {"append_kernel"}


TRAINING = {"centroid_sums_kernel", "add_parts_kernel"}
TRAINED = {
    "seed": ({"H": 128, "S": 32000}, {}),
    "fine": ({"H": 128, "dtype": jnp.bfloat16}, {"num_subspaces": 16, "num_bits": 8}),
    "odd sizes": ({"H": 96, "K": 3, "S": 777, "B": 2}, {"num_subspaces": 3, "num_bits": 5}),
    "inner product": (
        {"H": 4, "dtype": jnp.float16},
        {"num_bits": 1, "metric": "ip", "train_tokens": 100},
    ),
    "the largest codebook": ({"H": 64}, {"num_subspaces": 1, "num_bits": 8}),
}


@pytest.mark.parametrize("kv_layout", ["BSKH", "BKSH"])
@pytest.mark.parametrize("name", TRAINED)
def test_training_is_kernels_and_so_is_what_measures_its_gain(name, kv_layout):
    shape, fields = TRAINED[name]
    config = IndexerConfig(**fields)
    _, key, index = arguments(T=5000, **{"S": 5000, **shape}, config=config)
    B, _, K, H = key.shape
    S = index.codes.shape[-1]
    key = shaped((B, S, K, H) if kv_layout == "BSKH" else (B, K, S, H), key.dtype)
    options = {"config": config, "kv_layout": kv_layout}
    with an_h100():
        built = lowered(functools.partial(build_index, **options), key, index.lengths)
        again = lowered(
            lambda index, key, rows: rebuild(index, key, rows=rows, **options),
            index,
            key,
            shaped((B,), bool),
        )
        gain = lowered(functools.partial(rebuild_gain, **options), index, key)
    assert kernels(built) == kernels(again) == TRAINING | {"append_kernel"}
    assert kernels(gain) == TRAINING
    assert not any("f64" in text for text in (built, again, gain))


@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
def test_training_that_looks_ahead_is_the_same_kernels(grouping, pairs):
    """They turn keys themselves, in either layout of pairs."""
    config = IndexerConfig(grouping=grouping, metric="ip" if pairs == "half" else "euclidean")
    options = {"config": config, "look_ahead": 4096, "rope": Rope.from_base(1e4, 60, pairs)}
    key, lengths = shaped((2, 5000, 2, 64), jnp.bfloat16), shaped((2,), jnp.int32)
    with an_h100():
        text = lowered(functools.partial(build_index, **options), key, lengths)
    assert kernels(text) == TRAINING | {"append_kernel"}
    assert "f64" not in text


def test_codebooks_too_large_for_a_program_are_trained_by_xla():
    config = IndexerConfig(num_subspaces=1, num_bits=8)
    with an_h100():
        text = lowered(
            functools.partial(build_index, config=config),
            shaped((1, 5000, 2, 128), jnp.float32),
            shaped((1,), jnp.int32),
        )
    assert kernels(text) == {"append_kernel"}


def named(implementation):
    """Every function that has implementations, with the arrays it takes."""
    config = IndexerConfig(cells=True)
    query, key_new, index = arguments_with_cells(config, B=2)
    key, rows = shaped((2, 5000, 2, 64), jnp.float32), shaped((2,), bool)
    options = {"config": config, "implementation": implementation}
    return {
        "select": (functools.partial(select, **options), query, index),
        "indexer_next": (functools.partial(indexer_next, **options), query, key_new, index),
        "append": (functools.partial(append, **options), index, key_new),
        "build_index": (functools.partial(build_index, **options), key, index.lengths),
        "rebuild": (lambda *x: rebuild(*x[:2], rows=x[2], **options), index, key, rows),
        "rebuild_gain": (functools.partial(rebuild_gain, **options), index, key),
    }


@pytest.mark.parametrize("function", named(None))
def test_xla_launches_no_kernel_on_any_platform_and_the_default_does(function):
    with an_h100():
        by_xla, by_default, by_triton = (
            lowered(*named(implementation)[function]) for implementation in ("xla", None, "triton")
        )
    assert "triton" not in by_xla
    assert kernels(by_default)
    assert kernels(by_triton) == kernels(by_default)


@pytest.mark.parametrize("function", ["build_index", "rebuild", "rebuild_gain"])
def test_triton_by_name_refuses_codebooks_too_large_for_a_program(function):
    """The default trains them by XLA."""
    config = IndexerConfig(num_subspaces=1, num_bits=8)
    _, key, index = arguments(T=5000, H=128, config=config)
    options = {"config": config, "implementation": "triton"}
    call, *arrays = {
        "build_index": (functools.partial(build_index, **options), key, index.lengths),
        "rebuild": (
            lambda *x: rebuild(*x[:2], rows=x[2], **options),
            index,
            key,
            shaped((1,), bool),
        ),
        "rebuild_gain": (functools.partial(rebuild_gain, **options), index, key),
    }[function]
    with (
        an_h100(),
        pytest.raises(NotImplementedError, match=r"^implementation: .*256 centroids of 128"),
    ):
        lowered(call, *arrays)


def test_phi_is_not_read_for_the_euclidean_metric():
    config = IndexerConfig()
    _, key_new, index = arguments(config=config)
    with_phi = dataclasses.replace(index, phi=shaped((1, 2, 2), jnp.float32))
    with an_h100():
        programs = [
            re.findall(
                r"custom_call @[^\n]*\(([^)]*)\) \{",
                lowered(functools.partial(append, config=config), i, key_new),
            )
            for i in (index, with_phi)
        ]
    assert [len(operands[0].split(",")) for operands in programs] == [4, 4]


def test_donated_codes_are_written_in_place():
    config = IndexerConfig()
    step = functools.partial(indexer_next, config=config)
    with an_h100():
        text = lowered(step, *arguments(config=config), donate_argnums=2)
    signature = text[text.index("@main(") : text.index("->", text.index("@main("))]
    donated = re.findall(
        r"tensor<([^>]*)> \{[^}]*(?:tf.aliasing_output|jax.buffer_donor)", signature
    )
    assert "1x2x2x5000xui8" in donated
    assert "output_operand_aliases" in text or "output_operand_alias" in text


@pytest.mark.parametrize("selector", KERNELS)
def test_a_step_lowers_under_vmap_and_scan(selector):
    config = IndexerConfig(heavy_size=32)
    query, key_new, index = arguments(config=config, lead=(3,))
    step = functools.partial(indexer_next, config=config, selector=selector)

    def layers(query, key_new, index):
        return jax.lax.map(lambda args: step(*args), (query, key_new, index))

    def steps(query, key_new, index):
        def one(index, inputs):
            selection, index = step(*inputs, index)
            return index, selection

        return jax.lax.scan(one, index, (query, key_new))

    with an_h100():
        for text in (
            lowered(jax.vmap(step), query, key_new, index),
            lowered(layers, query, key_new, index),
            lowered(steps, query, key_new, arguments(config=config)[2]),
        ):
            assert kernels(text) == COMMON | KERNELS[selector]


@pytest.mark.parametrize("selector", KERNELS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_step_lowers_under_shard_map_over_batch_and_heads(selector, check_vma):
    config = IndexerConfig(heavy_size=32)
    args = arguments(B=4, N=8, K=4, config=config)
    step = functools.partial(indexer_next, config=config, selector=selector, return_weights=True)
    heads = PartitionSpec("batch", None, "heads")
    index_spec = PQIndex(
        codebooks=PartitionSpec("batch", "heads"),
        codes=PartitionSpec("batch", "heads"),
        lengths=PartitionSpec("batch"),
    )
    with an_h100((2, 2), ("batch", "heads")) as mesh:
        sharded = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(heads, heads, index_spec),
            out_specs=(heads, index_spec),
            check_vma=check_vma,
        )
        text = lowered(sharded, *args)
    first = first_kernel(weights=True)
    assert kernels(text) == {first} | KERNELS[selector]


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("has_cells", [True, False])
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_layer_lowers_where_rows_are_split_over_devices(has_cells, tokens, check_vma):
    """Codebooks, cells, lists and attention, in all of which positions count from the device's."""
    config = IndexerConfig(heavy_size=300, sink_size=16, window_size=16, cells=has_cells)
    B, S, K, N, H = 2, 65536, 4, 8, 64
    query, new = (jax.ShapeDtypeStruct((B, tokens, heads, H), jnp.bfloat16) for heads in (N, K))
    cache = jax.ShapeDtypeStruct((B, S, K, H), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)

    def layer(query, new, key, value, lengths):
        by = {"sequence_axis": "tokens"}
        index = build_index(key, lengths, config, **by)
        cache = DecodeCache(key, value, append(index, new, config, **by))
        selection = select(query, cache.index, config, return_weights=True, **by)
        attended = sparse_attention(query, key, value, selection, **by)
        out, cache = decode_attention(query, new, new, cache, config, **by)
        return attended, out, cache.key, cache.index.lengths

    with an_h100((2, 2), ("heads", "tokens")) as mesh:
        whole, of_cache = PartitionSpec(None, None, "heads"), PartitionSpec(None, "tokens", "heads")
        sharded = jax.shard_map(
            layer,
            mesh=mesh,
            in_specs=(whole, whole, of_cache, of_cache, PartitionSpec()),
            out_specs=(whole, whole, of_cache, PartitionSpec()),
            check_vma=check_vma,
        )
        text = lowered(sharded, query, new, cache, cache, lengths)
    found = kernels(text)
    by_cells = has_cells and tokens <= 8
    selector = {"cells_select_kernel"} if by_cells else KERNELS["threshold"]
    assert found > {"listed_ranks_kernel", "keep_best_kernel", "merge_kernel"} | selector
    assert "cells_attend_kernel" not in found


def test_the_default_selector_is_threshold():
    config = IndexerConfig(num_subspaces=16)
    query, _, index = arguments(config=config)
    with an_h100():
        text = lowered(functools.partial(select, config=config), query, index)
    assert kernels(text) == {"lookup_table_kernel"} | KERNELS["threshold"]


def test_the_default_selector_of_small_caches_is_cells_where_a_pool_follows():
    """Behind lists the rest would weigh tokens one by one."""
    B, S, K, N, H = 1, 1024, 2, 4, 64
    query, new = (jnp.zeros((B, 1, heads, H), jnp.bfloat16) for heads in (N, K))
    for fields, one in (({}, "merge_kernel"), ({"rerank": 4}, "search_pool_kernel")):
        config = IndexerConfig(heavy_size=32, sink_size=16, window_size=16, cells=True, **fields)
        cache = empty_cache(config, B, S, K, H)
        with an_h100():
            text = lowered(
                functools.partial(decode_attention, config=config), query, new, new, cache
            )
        assert one in kernels(text)


@pytest.mark.parametrize("mapped", ["none", "vmap", "two vmaps"])
@pytest.mark.parametrize("rows", [16, 17, 32, 33])
def test_codes_beyond_32_bit_offsets_go_to_xla(rows, mapped):
    """Between 2**31 and 2**32 bytes: JAX counts in 64 bits from there on, in 32 up to there."""
    config = IndexerConfig(num_subspaces=16, num_bits=8)
    lead = {"none": (), "vmap": (rows,), "two vmaps": (1, rows)}[mapped]
    B = 1 if lead else rows
    query, key_new, index = arguments(
        B=B, N=8, K=8, H=128, S=1 << 20, config=config, lead=lead
    )  # fmt: skip
    for name, first in (("select", query), ("append", key_new)):
        for implementation in (None, "triton"):
            function = functools.partial(
                {"select": select, "append": lambda q, i, **o: append(i, q, **o)}[name],
                config=config,
                implementation=implementation,
            )
            for _ in lead:
                function = jax.vmap(function)
            too_large = rows in (17, 32)
            with an_h100():
                if implementation and too_large:
                    with pytest.raises(NotImplementedError, match=r"between 2\*\*31 and 2\*\*32"):
                        lowered(function, first, index)
                    continue
                assert bool(kernels(lowered(function, first, index))) != too_large, name


ATTENTION = {
    "plain": {},
    "odd sizes": {"H": 34, "of_value": 130, "N": 15, "K": 3, "S": 777, "B": 2},
    "three query tokens": {"T": 3, "N": 7, "K": 1, "dtype": jnp.float16, "H": 130, "of_value": 34},
    "one token": {"S": 1, "N": 32, "K": 1, "H": 8, "of_value": 8},
    "large heads": {"H": 576, "of_value": 512, "N": 16, "K": 1, "dtype": jnp.bfloat16},
    "many heads": {"N": 128, "K": 8, "H": 256, "dtype": jnp.bfloat16, "S": 40000},
}


def caches_of(B=1, K=2, S=5000, H=64, of_value=64, dtype=jnp.float32, kv_layout="BSKH", **_):
    """(key, value) of these shapes."""
    tokens = (S, K) if kv_layout == "BSKH" else (K, S)
    return tuple(shaped((B, *tokens, size), dtype) for size in (H, of_value))


def stacked(tree, layers):
    return jax.tree.map(lambda x: shaped((layers, *x.shape), x.dtype), tree)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_over_lists_is_two_kernels(name):
    shape, kv_layout = ATTENTION[name], ("BSKH", "BKSH")[list(ATTENTION).index(name) % 2]
    query, _, _ = arguments(**{k: v for k, v in shape.items() if k != "of_value"})
    key, value = stacked(caches_of(**shape, kv_layout=kv_layout), 3)
    lists = shaped((*query.shape[:3], 700), jnp.int32)

    def attend(query, key, value, lists, layer):
        return sparse_attention(
            query, key, value, Selection(lists, lists[..., 0]), return_lse=True, layer=layer,
            logits_soft_cap=30.0, kv_layout=kv_layout,
        )  # fmt: skip

    with an_h100():
        text = lowered(attend, query, key, value, lists, shaped((), jnp.int32))
    assert kernels(text) == {"listed_kernel", "merge_kernel"}
    assert "f64" not in text


@pytest.mark.parametrize("heavy_size", [0, 200])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_over_lists_of_select_is_two_kernels(name, heavy_size):
    """What query heads share is read in the same launch as what they do not."""
    shape, config = ATTENTION[name], IndexerConfig(heavy_size=heavy_size)
    query, _, _ = arguments(**{k: v for k, v in shape.items() if k != "of_value"})
    key, value = caches_of(**shape)
    lists = shaped((*query.shape[:3], config.max_selected(query.shape[1])), jnp.int32)

    def attend(query, key, value, lists):
        selection = Selection(lists, lists[..., 0])
        return sparse_attention(query, key, value, selection, config=config)

    with an_h100():
        text = lowered(attend, query, key, value, lists)
    names = ["shared_kernel"] * (query.shape[2] > key.shape[2])
    names += ["listed_kernel"] * (heavy_size > 0 or not names)
    assert kernels(text) == {"_and_".join(names), "merge_kernel"}
    assert "f64" not in text


@pytest.mark.parametrize(
    ("selector", "layers"),
    [("threshold", 4), ("top_k", None), ("cells", 4), ("cells, apart", None)],
)
@pytest.mark.parametrize("name", ATTENTION)
def test_a_decode_step_of_a_layer_lowers_to_kernels_alone(name, selector, layers):
    """Which write caches and state in place, in a launch for all that needs no selection."""
    shape = {"B": 1, "T": 1, "K": 2, "S": 5000, "H": 64, "of_value": 64, **ATTENTION[name]}
    by_cells = "cells" in selector
    # The middle of a short list is attended to where it is found.
    apart = selector != "cells"
    heavy = 300 if apart else 100
    config = IndexerConfig(cells=by_cells, heavy_size=heavy, num_bits=4, sink_size=19)
    kv_layout = "BSKH" if layers is None else "BKSH"
    of_query = {k: v for k, v in shape.items() if k != "of_value"}
    query, _, index = arguments(**of_query, config=config)
    if by_cells:
        index = jax.eval_shape(functools.partial(with_cells, config=config), index)
    cache = DecodeCache(*caches_of(**shape, kv_layout=kv_layout), index)
    cache = cache if layers is None else stacked(cache, layers)
    new = caches_of(**{**shape, "S": shape["T"]}, kv_layout=kv_layout)

    def decode(query, key_new, value_new, cache, counts, layer):
        return decode_attention(
            query, key_new, value_new, cache, config, counts=counts, kv_layout=kv_layout,
            layer=None if layers is None else layer, selector=selector.split(",")[0],
            implementation="triton",
        )  # fmt: skip

    counts, layer = shaped((shape["B"],), jnp.int32), shaped((), jnp.int32)
    with an_h100():
        text = lowered(decode, query, *new, cache, counts, layer, donate_argnums=3)
    first = "write_kernel_and_always_kernel_and_" + first_kernel(seal=by_cells)
    last = {"listed_kernel", "merge_kernel"} if apart else {"cells_attend_kernel"}
    chosen = KERNELS | {"cells": set(), "cells, apart": {"cells_select_kernel"}}
    assert kernels(text) == {first} | last | chosen[selector]
    assert "f64" not in text
    assert not re.search(r"stablehlo\.(case|if|while|sort)", text)
    signature = text[text.index("@main(") : text.index("->", text.index("@main("))]
    donated = len(re.findall(r"tf.aliasing_output|jax.buffer_donor", signature))
    assert donated == len(jax.tree.leaves(cache))


POOLS = {
    "rerank": ({}, {"rerank": 8}),
    "rest": ({"layers": 3}, {"estimate_rest": "codes", "cells": True}),
    "both": ({}, {"rerank": 4, "estimate_rest": "codes", "cells": True}),
    "both, by the mean": ({"T": 3, "layers": 3}, {"rerank": 4, "estimate_rest": "mean"}),
    "both, of many codes": ({"H": 96}, {
        "rerank": 2, "estimate_rest": "codes", "num_subspaces": 3, "num_bits": 8,
        "heavy_size": 77, "sink_size": 3, "window_size": 0,
    }),
    "both, of no budget": ({"S": 300}, {
        "rerank": 2, "estimate_rest": "mean", "num_bits": 1, "heavy_size": 0, "sink_size": 0,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_and_the_rest_lower_to_kernels_alone(name):
    """Two launches, four to rerank, or those of a selector and two or three; nothing is copied."""
    shape, sizes = POOLS[name]
    shape = {"T": 1, "H": 64, "S": 40001, "layers": None} | shape
    config = IndexerConfig(**sizes)
    cache = jax.eval_shape(
        functools.partial(empty_cache, config, 2, shape["S"], 2, shape["H"], layers=shape["layers"])
    )
    query, key_new, _ = arguments(B=2, T=shape["T"], H=shape["H"], dtype=jnp.bfloat16)

    def decode(query, key_new, cache, layer):
        return decode_attention(
            query, key_new, key_new, cache, config, implementation="triton", logits_soft_cap=30.0,
            layer=None if shape["layers"] is None else layer,
        )  # fmt: skip

    with an_h100():
        text = lowered(decode, query, key_new, cache, shaped((), jnp.int32), donate_argnums=2)
    has_rest = bool(config.estimate_rest)
    first = "write_kernel_and_always_kernel_and_" + first_kernel(seal=config.cells)
    first = first + "_and_sum_values_kernel" if has_rest else first
    ranks = ["rank_keys_kernel"] if config.rerank > 1 else []
    if config.cells and not ranks:
        others = {"cells_pool_kernel"}
    else:
        weigh = ["weigh_tokens_kernel"] if has_rest else []
        if config.cells:
            weigh = ["weigh_codes_kernel"] if config.estimate_rest == "codes" else []
        searches = ["search_pool_kernel"]
        if config.estimate_rest == "codes":
            searches += ["count_candidates_kernel"]
        selects = {"_and_".join(searches)} if config.cells else KERNELS["threshold"]
        others = selects | {"_and_".join(weigh + ranks), "attend_pool_kernel"}
    assert kernels(text) == {first} | others
    assert "f64" not in text
    assert not re.search(r"stablehlo\.(case|if|while|sort)", text)
    signature = text[text.index("@main(") : text.index("->", text.index("@main("))]
    donated = len(re.findall(r"tf.aliasing_output|jax.buffer_donor", signature))
    assert donated == len(jax.tree.leaves(cache))


@pytest.mark.parametrize("name", [name for name in POOLS if "estimate_rest" in POOLS[name][1]])
def test_the_rest_of_a_selection_lowers_to_kernels_alone(name):
    """Behind cells it is in the kernel that selects; attention takes it where it merges."""
    shape, sizes = POOLS[name]
    shape = {"T": 1, "H": 64, "S": 40001, "layers": None} | shape
    config = IndexerConfig(**sizes)
    cache = jax.eval_shape(
        functools.partial(empty_cache, config, 2, shape["S"], 2, shape["H"], layers=shape["layers"])
    )
    query, _, _ = arguments(B=2, T=shape["T"], H=shape["H"], dtype=jnp.bfloat16)

    def attend(query, cache, layer, *, has_rest):
        layer = None if shape["layers"] is None else layer
        options = {"layer": layer, "implementation": "triton"}
        selector = "cells" if config.cells else "threshold"
        found = select(
            query, cache.index, config, return_rest=has_rest, selector=selector, **options
        )
        return sparse_attention(
            query, cache.key, cache.value, found, config=config, rest=found.rest, **options
        )

    with an_h100():
        plain, text = (
            lowered(functools.partial(attend, has_rest=rest), query, cache, shaped((), jnp.int32))
            for rest in (False, True)
        )
    want = kernels(plain) | {"weigh_tokens_kernel", "listed_rest_kernel"}
    if config.cells:
        want = kernels(plain) - {"cells_select_kernel"} | {"cells_rest_kernel"}
    assert kernels(text) == want
    assert "f64" not in text
    assert not re.search(r"stablehlo\.(case|if|while|sort)", text)


CAPACITY = 5003  # no other size is this


def stacked_step(selector, *, layers, cells=True):
    """A decode step of a layer of many by kernels, and the arrays it takes but for the layer."""
    config = IndexerConfig(cells=cells)
    query, key_new, _ = arguments(B=2, S=CAPACITY, dtype=jnp.bfloat16)
    make = functools.partial(empty_cache, config, 2, CAPACITY, 2, 64, layers=layers)
    options = {"config": config, "implementation": "triton", "selector": selector}

    def step(query, key_new, cache, layer):
        return decode_attention(query, key_new, key_new, cache, layer=layer, **options)

    return step, (query, key_new, jax.eval_shape(make))


@pytest.mark.parametrize("selector", ["cells", "threshold"])
def test_a_step_of_stacked_layers_moves_nothing_of_the_size_of_a_cache(selector):
    """What has an axis of the capacity goes into kernels and comes out of them, or is reshaped."""
    step, arrays = stacked_step(selector, layers=4)
    with an_h100():
        text = lowered(step, *arrays, shaped((), jnp.int32), donate_argnums=2)
    of_capacity = re.compile(rf"[<x]{CAPACITY}[x>]")
    found = [line.strip() for line in text.splitlines() if of_capacity.search(line)]
    operations = {
        re.match(r"(?:[%\w:, ]+ = )?(\"?[\w.]+\"?)", line)[1] for line in found
    }  # fmt: skip
    assert operations == {
        "func.func",
        "call",
        "return",
        "stablehlo.reshape",
        "stablehlo.custom_call",
    }
    calls = [line for line in found if "custom_call" in line]
    assert all("xla.gpu.triton" in line for line in calls)
    # The whole cache, every layer of it, is what kernels take and what they write into.
    assert all(f"4x2x{CAPACITY}x2x64xbf16" in line for line in (calls[0], calls[-1]))
    signature = text[text.index("@main(") : text.index("->", text.index("@main("))]
    donated = re.findall(
        r"tensor<([^>]*)> \{[^}]*(?:tf.aliasing_output|jax.buffer_donor)", signature
    )
    assert donated.count(f"4x2x{CAPACITY}x2x64xbf16") == 2
    assert f"4x2x2x2x{CAPACITY}xui8" in donated


@pytest.mark.parametrize("selector", ["cells", "threshold"])
def test_many_unrolled_layers_lower_each_kernel_at_most_twice(selector):
    """All call one function, since the number of the layer is no part of it."""
    step, (query, key_new, cache) = stacked_step(selector, layers=32)

    def token(query, key_new, cache):
        for layer in range(32):
            query, cache = step(query, key_new, cache, layer)
        return query, cache

    with an_h100():
        text = lowered(token, query, key_new, cache, donate_argnums=2)
    names = re.findall(r'name = \\?"(\w+_kernel)', text)
    # Twice by JAX 0.12, once by those before.
    assert len(names) == text.count("custom_call @__gpu$xla.gpu.triton") <= 2 * len(set(names))
    assert len(set(names)) == {"cells": 2, "threshold": 5}[selector]
    assert len(re.findall(r"call @_decode\w*\(", text)) == 32
