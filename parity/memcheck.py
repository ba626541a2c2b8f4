"""Runs every kernel over odd shapes, for a memory checker to watch.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m parity.memcheck

With `--plant` a kernel stores past the end of its output instead, which the checker must report.
Arrays come from CUDA's own asynchronous allocator, whose ends the checker knows to the byte: JAX's
pool hides them, and so do the 2 MiB granules of its "platform" allocator.
"""

import argparse
import os

os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "cuda_async"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# A captured graph would keep its buffers in one allocation.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax
import jax.numpy as jnp
import numpy as np

from jax_indexer import IndexerConfig, PQIndex, indexer_next
from jax_indexer.kernels import backend

# (B, T, N, K, H, S, config): sizes around and between those of blocks.
CASES = (
    (1, 1, 1, 1, 32, 1, IndexerConfig(num_bits=1)),
    (1, 1, 3, 1, 34, 1023, IndexerConfig(heavy_size=16, sink_size=3, window_size=5)),
    (3, 1, 6, 3, 64, 1025, IndexerConfig(num_subspaces=4, num_bits=8, heavy_size=300)),
    (2, 3, 10, 2, 96, 2777, IndexerConfig(num_subspaces=32, num_bits=3, heavy_size=33)),
    (2, 1, 4, 2, 256, 5001, IndexerConfig(num_subspaces=1, num_bits=7, metric="ip")),
    (
        1,
        1,
        4,
        4,
        130,
        40000,
        IndexerConfig(num_subspaces=5, heavy_size=1500, table_dtype=jnp.float16),
    ),
)


def run_kernels() -> None:
    rng = np.random.default_rng(0)
    for B, T, N, K, H, S, config in CASES:
        M, C, augmented = config.num_subspaces, config.num_centroids, config.metric == "ip"
        index = PQIndex(
            codebooks=jnp.asarray(
                rng.standard_normal((B, K, M, C, H // M + augmented)), jnp.float32
            ),
            codes=jnp.asarray(rng.integers(0, 256, (B, K, M, S), dtype=np.uint8)),
            lengths=jnp.asarray(rng.integers(S // 2, S + 1, B), jnp.int32),
            phi=jnp.full((B, K, M), 9.0) if augmented else None,
        )
        query = jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32)
        key_new = jnp.asarray(rng.standard_normal((B, T, K, H)), jnp.bfloat16)
        for selector in ("threshold", "top_k"):
            results = [
                jax.block_until_ready(
                    indexer_next(
                        query,
                        key_new,
                        index,
                        config,
                        return_weights=weights,
                        implementation="triton",
                        selector=selector,
                    )
                )
                for weights in (True, False)
            ]
            (with_weights, after), (without, _) = results
            np.testing.assert_array_equal(with_weights.indices, without.indices)
            np.testing.assert_array_equal(
                np.asarray(with_weights.weights).sum(-1), with_weights.counts
            )
            assert after.codes.shape == index.codes.shape
        print(f"checked {(B, T, N, K, H, S)}", flush=True)


def overrun_kernel(in_ref, out_ref):
    lane = jnp.arange(256, dtype=jnp.int32)
    backend.store(out_ref.at[lane], in_ref[0] + lane.astype(jnp.float32), mask=lane >= 0)


def run_overrun() -> None:
    (out,) = backend.launch(
        overrun_kernel,
        jnp.ones(100, jnp.float32),
        programs=1,
        out_shape=[jax.ShapeDtypeStruct((128,), np.float32)],
        num_warps=4,
    )
    print("checked the planted overrun", flush=True)
    jax.block_until_ready(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plant", action="store_true", help="store past the end of an output")
    (run_overrun if parser.parse_args().plant else run_kernels)()
