"""Autotuning of the score kernels, and what stands in for it in Triton's interpreter."""

import os

import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tuned(configs: list[triton.Config], key: list[str]):
    """Decorates a kernel so that each new `key` of arguments times `configs` and keeps the fastest.

    Interpreted, the first of `configs` is taken: timing needs a GPU driver.

    Args:
      configs: block sizes and warp counts to choose from.
      key: names of the arguments to tune for. The number of keys must not be among them: it grows
        with every decode step. `size_class` stands for it.
    """
    if not INTERPRETED:
        return triton.autotune(configs=configs, key=key)
    fixed = configs[0].kwargs
    return triton.heuristics({name: lambda _, value=fixed[name]: value for name in fixed})


def size_class(rows: int, num_keys: int) -> int:
    """The power of four of the scores to compute, so that tuning on a small input stays there."""
    return (rows * num_keys).bit_length() // 2
