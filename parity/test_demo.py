"""The demo's numbers, recomputed row by row in numpy from the codebooks alone."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_indexer.__main__ as demo
from jax_indexer.data import load_sample

STEPS = 6


@pytest.fixture(scope="module")
def prepared():
    return demo.prepare(num_subspaces=2, num_bits=6, steps=STEPS)


@pytest.fixture(scope="module")
def results(prepared):
    return {budget: prepared.decode(budget) for budget in (32, 128)}


def recompute(prepared, budget):
    """Recall, masses and errors of one budget, in float64, one row at a time."""
    sample = load_sample()
    key, value = (array[:, 0].astype(np.float64) for array in (sample.key, sample.value))
    codebooks = np.asarray(prepared.index.codebooks)[0, 0].astype(np.float64)  # [M, C, D]
    parts = key.reshape(len(key), len(codebooks), -1)
    # The norm of a key is the same for all centroids.
    distance = np.square(codebooks).sum(-1) - 2 * np.einsum("smd,mcd->smc", parts, codebooks)
    codes = distance.argmin(-1)  # [S, M]
    rows = []
    for t in range(STEPS):
        visible = 8192 - STEPS + 1 + t
        for query in sample.query[128 - STEPS + t].astype(np.float64):
            position = np.arange(visible)
            always = (position < 64) | (position >= visible - 64)
            table = np.einsum("md,mcd->mc", query.reshape(len(codebooks), -1), codebooks)
            score = {
                "pq": table[np.arange(len(codebooks)), codes[:visible]].sum(-1),
                "exact": key[:visible] @ query,
            }
            attention = np.exp(score["exact"] / 8 - score["exact"].max() / 8)
            attention /= attention.sum()
            full = attention @ value[:visible]
            heavy, mass, output = {}, {}, {}
            for name, s in score.items():
                candidates = position[~always]
                order = np.lexsort((candidates, -s[candidates]))  # the last key is the primary one
                heavy[name] = candidates[order[:budget]]
                kept = np.union1d(position[always], heavy[name])
                mass[name] = attention[kept].sum()
                output[name] = attention[kept] @ value[kept] / mass[name]
            rows.append(
                (
                    len(set(heavy["pq"]) & set(heavy["exact"])) / budget,
                    mass["pq"],
                    mass["exact"],
                    np.linalg.norm(output["pq"] - full) / np.linalg.norm(full),
                    np.linalg.norm(output["exact"] - full) / np.linalg.norm(full),
                    np.linalg.norm(output["pq"] - output["exact"])
                    / np.linalg.norm(output["exact"]),
                )
            )
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("budget", [32, 128])
def test_every_reported_number_equals_an_independent_one(prepared, results, budget):
    got = dataclasses.astuple(results[budget])
    assert got[0] == budget
    # The demo's attention is float32, some 1e-6 off.
    np.testing.assert_allclose(got[1:7], recompute(prepared, budget), rtol=1e-5)
    assert got[7] > 0


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


def test_finer_codes_come_closer_to_exact(prepared, results):
    finer = demo.prepare(num_subspaces=8, num_bits=6, steps=STEPS).decode(128)
    # By the seed of training it is 0.05 to 0.12.
    assert finer.recall > results[128].recall + 0.05
    assert results[128].error > finer.error > finer.exact_error
    assert finer.exact_mass == results[128].exact_mass


def test_the_named_implementation_is_one_that_runs_here(prepared):
    step = jax.eval_shape(
        lambda query, index: demo.select(
            query, index, prepared.config, implementation=prepared.implementation
        ),
        jnp.zeros((1, 1, 3, 64)),
        prepared.index,
    )
    assert step.counts.shape == (1, 1, 3)


def test_the_command_prints_its_numbers_and_draws_them(tmp_path, capsys, monkeypatch):
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
    prepared = demo.prepare(2, 6, STEPS)
    for budget in (64, 256):
        (cells,) = re.findall(rf"^ +{budget} +([\d. ]+)$", text, re.MULTILINE)
        recall, *others, milliseconds = map(float, cells.split())
        expected = recompute(prepared, budget)
        assert recall == pytest.approx(expected[0], abs=0.00051)
        np.testing.assert_allclose(others, expected[1:], atol=0.000051)
        assert milliseconds > 0
    prose = " ".join(text.split())
    device = jax.devices()[0].device_kind
    assert f'Runs on {device}, implementation "{prepared.implementation}"' in prose
    error, exact_error = recompute(prepared, 256)[3:5]
    assert f"At a budget of 256 a head's output moves by {error:.1%}" in prose
    assert f"by {exact_error:.1%} with exact top-k" in prose
    assert "IndexerConfig(num_subspaces=2, num_bits=6, heavy_size=256)" in prose
    # Codes: 2 of a byte a token; codebooks: 2 x 64 x 32 float32; the length; 64 float16 a key.
    assert "32.8 kB for the index (codes 16.4 kB, codebooks 16.4 kB)" in prose
    assert "1,048.6 kB for the keys in float16: 3.1%" in prose


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
