"""Rows split over devices, each check of `parity.sequence` in a process with host devices."""

import dataclasses
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jax_indexer import IndexerConfig, PQIndex, reference
from jax_indexer.cells import no_cells, seal
from jax_indexer.kernels import pipeline
from jax_indexer.kernels.exchange import keep_best, listed_ranks
from jax_indexer.kernels.lookup_table import tables_from
from jax_indexer.kernels.step import Lengths, Step
from jax_indexer.state import Sealing, Span
from parity.checked_memory import checked


def run(what: str, *options: str) -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of it
    }
    command = [sys.executable, "-W", "error", "-m", "parity.sequence", what, *options]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "checked" in done.stdout


@pytest.mark.parametrize(
    "what",
    ["lists", "life", "training", "gradients", "kernels", "programs", "messages", "hosts"],
)
def test_rows_split_over_devices(what):
    run(what)


def test_random_meshes(request):
    """`--meshes 100` for as many as were run before this was merged, of which 8 take 40 s."""
    run("meshes", "--number", str(request.config.getoption("--meshes")))


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_kernels_on_checked_memory(tokens, middle):
    """Appending, sealing, ranks and the cut of three devices, one after another, without a mesh."""
    config = IndexerConfig(num_bits=2, heavy_size=6, sink_size=3, window_size=5, cells=tokens == 1)
    B, K, N, H, part, devices = 3, 1, 2, 4, 40, 3
    rng = np.random.default_rng(tokens)
    lengths = jnp.asarray([118, 41, 9], jnp.int32)  # one is full, one straddles, one is short
    index = PQIndex(
        codebooks=jnp.asarray(rng.integers(-1, 2, (B, K, 2, 4, 2)), jnp.float32),
        codes=jnp.asarray(rng.integers(0, 4, (B, K, 2, devices * part)), jnp.uint8),
        lengths=lengths,
    )
    query, key = (jnp.asarray(rng.integers(-2, 3, (B, tokens, n, H)), jnp.float32) for n in (N, K))
    table = reference.lookup_table(query, index.codebooks, config)
    room, after = reference.make_room(lengths, None, tokens, devices * part)
    whole = reference.append_tokens(key, index, room, after, config, "BSKH")
    want = reference.select_from_table(table, whole.codes, after, None, config, None)

    first, ranks, steps = [], [], []
    for device in range(devices):
        own = slice(device * part, (device + 1) * part)
        span = Span(jnp.int32(own.start), part, devices, "none")
        local = PQIndex(index.codebooks, index.codes[..., own], lengths)
        if config.cells:
            sealing = Sealing(config.first_candidate, config.window_size, segment=8, block=8)
            cells = no_cells(B, K, part, config, sealing)
            cells = seal(cells, local.codes, lengths - 30, jnp.ones(B, bool), config, span)
            local = dataclasses.replace(local, cells=cells, high_water=lengths)
        step = pipeline.of_devices(Step.of(local, config, T=tokens, N=N), span)
        with checked(device):
            grown = pipeline.launch_append(step, key, local, None, span=span)
            np.testing.assert_array_equal(grown.codes, whole.codes[..., own])
            assert grown.lengths.tolist() == after.tolist()
            tables, of_rows = tables_from(table, step), Lengths.of(after, None, span)
            arguments = step, tables, grown, of_rows, None, "threshold", None
            lists = pipeline.lists_from(*arguments).indices
            codes = step.by_rows(grown.codes)
            ranks.append(listed_ranks(step, tables, codes, of_rows, lists, None))
        first.append(lists)
        steps.append((step, of_rows))
    found = [[] for _ in range(want.indices[..., 0].size)]
    for device, (lists, (step, of_rows)) in enumerate(zip(first, steps, strict=True)):
        with checked(device):
            kept = keep_best(step, of_rows, lists, jnp.stack(ranks), middle=middle)
        kept = pipeline.selection_of(step, kept).indices + device * part
        for own, one in zip(found, np.asarray(kept).reshape(len(found), -1), strict=True):
            own += one[one >= device * part].tolist()
    visible = reference.visible_tokens(after, None, devices * part, tokens)
    visible = np.broadcast_to(np.asarray(visible)[..., None], (B, tokens, N)).reshape(-1)
    wanted = np.asarray(want.indices).reshape(len(found), -1)
    for own, one, sees in zip(found, wanted, visible, strict=True):
        one = one[one >= 0]
        if middle:
            one = one[(one >= config.sink_size) & (one < sees - config.window_size)]
        assert own == one.tolist()
