"""The demo's numbers, recomputed token by token in numpy from the codebooks alone."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_indexer.__main__ as demo
from parity import oracle

STEPS = 6


@pytest.fixture(scope="module")
def prepared():
    return demo.prepare(num_subspaces=2, num_bits=6, steps=STEPS)


@pytest.fixture(scope="module")
def results(prepared):
    return {budget: prepared.compare(budget) for budget in (32, 128)}


def strided(x, num_subspaces):
    """Dimensions reordered, so that those of a subspace are neighbours."""
    parts = x.reshape(*x.shape[:-1], -1, num_subspaces)
    return np.moveaxis(parts, -1, -2).reshape(x.shape)


def recompute(prepared, budget, way):
    """Error and mass of one way with one budget, in float64, one query token at a time."""
    sample, index = prepared.sample, prepared.ahead if way.looks_ahead else prepared.plain
    config = dataclasses.replace(
        prepared.config, heavy_size=budget, rerank=way.rerank, estimate_rest=way.estimate_rest
    )
    codebooks = np.asarray(index.codebooks)
    key, value = sample.key[None], sample.value[None]
    codes, _ = oracle.encode(strided(key, config.num_subspaces), codebooks)
    rows = []
    for t in range(STEPS):
        visible = np.array([8192 - STEPS + 1 + t])
        query = sample.query[None, 128 - STEPS + t, None].astype(np.float32)
        table = oracle.exact_table(strided(query, config.num_subspaces), codebooks)
        out = oracle.decode_output(query, key, value, table, codes, visible, None, config)
        score = oracle.scores(table, codes, config.num_bits)
        for head in range(3):
            pool = oracle.tokens(score[0, 0, head], visible[0], 1, config.pool)
            rows.append(
                quality_of(query[0, 0, head], sample, visible[0], pool, budget, out[0, 0, head])
            )
    return np.mean(rows, axis=0)


def quality_of(query, sample, visible, pool, budget, out=None):
    """Error and mass of a head: of the best of a pool, and of what came out of it."""
    key, value = (x[:visible, 0].astype(np.float64) for x in (sample.key, sample.value))
    logits = key @ query.astype(np.float64) / 8
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    position = np.arange(visible)
    always = (position < 64) | (position >= visible - 64)
    candidates = np.setdiff1d(pool, position[always])
    best = candidates[np.argsort(-logits[candidates], kind="stable")[:budget]]
    attended = np.concatenate([position[always], best])
    mass, full = weights[attended].sum(), weights @ value
    if out is None:
        out = weights[attended] @ value[attended] / mass
    return np.linalg.norm(out - full) / np.linalg.norm(full), mass


def exact_quality(prepared, budget):
    """Error and mass of exact top-k."""
    sample = prepared.sample
    rows = [
        quality_of(query, sample, 8192 - STEPS + 1 + t, np.arange(8192 - STEPS + 1 + t), budget)
        for t in range(STEPS)
        for query in sample.query[128 - STEPS + t]
    ]
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("budget", [32, 128])
@pytest.mark.parametrize("way", demo.WAYS, ids=lambda way: way.name)
def test_every_reported_number_equals_an_independent_one(prepared, results, budget, way):
    # The demo's attention is float32, some 1e-6 off.
    wanted = recompute(prepared, budget, way)
    np.testing.assert_allclose(results[budget].quality[way.name], wanted, rtol=1e-5)


@pytest.mark.parametrize("budget", [32, 128])
def test_exact_top_k_is_that_of_the_true_keys(prepared, results, budget):
    wanted = exact_quality(prepared, budget)
    np.testing.assert_allclose(results[budget].quality[demo.EXACT], wanted, rtol=1e-12)


def test_the_indices_are_of_the_first_half_and_have_all_but_the_last_tokens(prepared):
    sample, half = prepared.sample, 4096
    key, value = (jnp.asarray(x[:half])[None] for x in (sample.key, sample.value))
    lengths, rope = jnp.array([half], jnp.int32), demo.Rope.from_base(1e5, 64, "interleaved")
    for index, ahead in (
        (prepared.plain, {}),
        (prepared.ahead, {"rope": rope, "look_ahead": 4096}),
    ):
        alone = demo.build_index(key, lengths, prepared.config, value=value, **ahead)
        np.testing.assert_array_equal(index.codebooks, alone.codebooks)
        assert index.lengths.tolist() == [8192 - STEPS]
        # All but the window and 15 tokens are summed.
        assert index.values.counts.sum(-1).tolist() == [[[8192 - STEPS - 64 - 15 - 64] * 2]]


def test_each_thing_more_brings_it_closer_to_full_attention(results):
    for result in results.values():
        errors = [result.quality[way.name].error for way in demo.WAYS]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < result.quality[demo.EXACT].error


def test_exact_rows_see_their_own_token_and_no_later_one(prepared):
    seen = prepared.exact.weights > 0
    last = 8191 - np.argmax(seen[..., ::-1], axis=-1)
    np.testing.assert_array_equal(last, np.repeat(np.arange(8192 - STEPS, 8192)[:, None], 3, 1))
    np.testing.assert_allclose(prepared.exact.weights.sum(-1), 1)


def test_a_budget_of_every_candidate_is_full_attention(prepared):
    everything = prepared.exact.top(8192)
    assert prepared.exact.mass(everything) == pytest.approx(1)
    output = prepared.exact.attend(everything)
    assert demo.relative_error(output, prepared.exact.output) < 1e-12


def test_the_named_implementation_is_one_that_runs_here(prepared):
    steps = prepared.decode(32, demo.WAYS[-1])
    assert prepared.implementation == ("triton" if jax.default_backend() == "gpu" else "xla")
    assert np.isfinite(steps).all()


def test_the_command_prints_its_numbers_and_draws_them(prepared, tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(demo, "QUICK_STEPS", STEPS)
    path = tmp_path / "picture.png"
    assert demo.main(["--quick", "--budgets", "64", "256", "--out", str(path)]) == 0
    text = capsys.readouterr().out
    *lines, last = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert last == f"Picture: {path}"
    assert path.read_bytes().startswith(b"\x89PNG")
    wanted = {
        budget: [
            *(recompute(prepared, budget, way) for way in demo.WAYS),
            exact_quality(prepared, budget),
        ]
        for budget in (64, 256)
    }
    for budget, qualities in wanted.items():
        found = re.findall(rf"^ +{budget} +([\d. ]+)$", text, re.MULTILINE)
        printed = [list(map(float, cells.split())) for cells in found]
        np.testing.assert_allclose(printed, np.transpose(qualities), atol=0.000051)
    prose = " ".join(text.split())
    device = jax.devices()[0].device_kind
    assert f'Runs on {device}, implementation "{prepared.implementation}"' in prose
    (plain, _), *_, (best, _), (exact, _) = wanted[64]
    assert f"At a budget of 64 a head's output moves by {plain:.1%}" in prose
    assert f"by {best:.1%} with all of it, by {exact:.1%} with exact top-k" in prose
    # Codes: 2 of a byte a token; codebooks: 2 x 64 x 32 float32; values: 2 x 64 x 65 of 4 bytes;
    # the length; 64 float16 a key.
    assert "66.1 kB for the index (codes 16.4 kB, codebooks 16.4 kB, the others" in prose
    assert "1,048.6 kB for the keys in float16: 6.3%" in prose


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--budgets", "0"], "expected a number in 1..4096"),
        (["--budgets", "many"], "expected a number in 1..4096"),
        (["--num-bits", "9"], "num_bits: expected an integer in 1..8, got 9"),
        (["--num-subspaces", "3"], "divisible by num_subspaces=3"),
    ],
)
def test_bad_options_are_refused_in_words(arguments, complaint, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stop:
        demo.main(["--quick", *arguments])
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "complaint"),
    [
        ("picture.txt", "expected a name that ends in "),
        ("picture", "expected a name that ends in "),
        ("folder.png", "Is a directory"),
        ("nowhere/picture.png", "No such file or directory"),
        ("/proc/picture.png", "expected a file that can be written"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_at_once(
    out, complaint, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "prepare", None)  # what takes time
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        demo.main(["--quick", "--out", str(tmp_path / out)])
    assert stop.value.code == 2
    assert re.search(rf"argument --out: .*{complaint}", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_package_gives_one_line_with_the_command(package):
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from jax_indexer.__main__ import main; sys.exit(main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"The demo needs {package}: python -m pip install matplotlib rich\n"
