"""The quality of lists, and the program that measures it, on the sample that ships."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import quality as program
from benchmarks import report, results
from jax_indexer.data import load_sample
from parity import quality

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def sample():
    """2048 tokens of the sample's kv head, as one layer."""
    query, key, value = (jnp.asarray(x)[None] for x in load_sample())
    return quality.Layers(query, key[:, -2048:], value[:, -2048:])


def test_the_whole_budget_has_no_error(sample):
    config = quality.config_of(2, 4, heavy_size=2048)
    error, recall = quality.quality(sample, [None], config)
    assert error[0] < 1e-5
    assert recall[0] == 1


def test_exact_top_k_is_better_than_ours_and_ours_than_no_training(sample):
    config = quality.config_of(2, 6, heavy_size=64)
    index = quality.our_index(sample, config, 0)
    untrained = quality.our_index(sample, quality.config_of(2, 6, kmeans_iters=0), 0)
    error, recall = quality.quality(sample, [None, index, untrained], config)
    assert error[0] < error[1]
    assert recall[0] == 1
    assert 0.2 < recall[1] < 1
    fit = [quality.inertia(sample.key, x.codebooks, config).sum() for x in (index, untrained)]
    assert fit[0] < 0.95 * fit[1]


def test_inertia_is_the_sum_of_squared_distances(sample):
    config = quality.config_of(2, 4)
    index = quality.our_index(sample, config, 0)
    parts = np.asarray(sample.key, np.float64)[0, 64:, 0].reshape(-1, 2, 32).swapaxes(0, 1)
    codes = np.asarray(index.codes)[0, 0, :, 64:, None].astype(int)
    decoded = np.take_along_axis(np.asarray(index.codebooks, np.float64)[0, 0], codes, axis=1)
    want = np.square(parts - decoded).sum((1, 2))
    np.testing.assert_allclose(quality.inertia(sample.key, index.codebooks, config)[0, 0], want)


@pytest.fixture(scope="module")
def decoded(sample):
    """The row of a decode of half of them."""
    return list(program.decoding(sample, [1024], [64], ["contiguous"]))


def test_every_table_has_rows_that_a_file_takes_and_a_report_shows(sample, decoded, tmp_path):
    rows = [
        *program.quantizers(sample, [(2, 4)], [64], starts=1),
        *program.drift(sample, [(2, 4)], [64]),
        *decoded,
    ]
    names = {name for name, _ in rows}
    tables = {"inertia", "attention", "table dtype", "drift", "drift, attention", "decoding"}
    assert names == tables
    about = dict.fromkeys(results.KEYS) | {"kind": "quality", "time": "2026-01-02"}
    results.write(
        tmp_path / "q.json", about | {"rows": [{"table": name} | row for name, row in rows]}
    )
    (found,) = results.load([tmp_path / "q.json"])
    assert report.quality_tables(found["rows"]).keys() == names


def test_each_option_brings_a_decode_closer_to_full_attention(decoded):
    """Together they are closer than exact top-k."""
    ((_, row),) = decoded
    assert row["plain"] > 1.2 * row["looking ahead"]
    assert row["looking ahead"] > 1.1 * row["and the rest"]
    assert row["looking ahead"] > 1.2 * row["and rerank 4"]
    assert row["and both"] < row["exact top-k"] < row["and rerank 4"] < row["looking ahead"]


def test_gain_tells_drift_and_rebuild_ends_it(sample):
    rows = [row for name, row in program.drift(sample, [(2, 4)], [64], steps=1) if name == "drift"]
    start, end = rows
    assert start["gain"] < 0.02 < end["gain"]
    assert end["gain after rebuild"] < 0.02
    assert end["error that rebuild removes"] > end["gain"]
