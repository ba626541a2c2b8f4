"""Options, marks and fixtures of the whole suite."""

import os

# Both frameworks share the GPU, and JAX reads this when it first touches it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest

from parity.real_keys import FILE_NAME

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if jax.default_backend() == "cpu":  # where compiling takes most of the time, and none is measured
    jax.config.update("jax_disable_most_optimizations", True)

# The same examples on every run, and no deadline: the first one of a shape compiles.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_addoption(parser):
    parser.addoption(
        "--meshes",
        metavar="N",
        type=int,
        default=8,
        help="random meshes that rows are split over",
    )
    parser.addoption(
        "--real-keys",
        metavar="DIR",
        type=Path,
        help=f"folder of {FILE_NAME}, as `python -m parity.real_keys --out DIR` writes it",
    )


@pytest.fixture(scope="module", autouse=True)
def _unloaded():
    """Programs of a module go with it: each takes maps of memory, of which a process has 65530."""
    yield
    jax.clear_caches()


@functools.cache
def _no_gpu() -> str:
    """Why GPU tests cannot run here, or nothing."""
    if not any(d.platform == "gpu" for d in jax.devices()):
        return "jax sees no NVIDIA GPU"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return "" if torch.cuda.is_available() else "torch sees no NVIDIA GPU"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and (reason := _no_gpu()):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def real_keys(request) -> dict[str, np.ndarray]:
    """The real queries, keys and values of three layers: arrays by name."""
    folder = request.config.getoption("--real-keys")
    if folder is None:
        pytest.skip("needs real keys: python -m parity.real_keys --out DIR, then --real-keys DIR")
    path = folder / FILE_NAME
    if not path.is_file():
        pytest.fail(f"no {path}; make it: python -m parity.real_keys --out {folder}")
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(params=["xla", pytest.param("triton", marks=pytest.mark.gpu)])
def implementation(request) -> str:
    """The implementations that must all give the contract's bits."""
    return request.param


_compiled: list[str] = []


@jax.monitoring.register_event_duration_secs_listener
def _count(event: str, duration: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


@pytest.fixture
def compilations() -> Callable[[], int]:
    """How many programs XLA has compiled since the test began, eager operations included."""
    before = len(_compiled)
    return lambda: len(_compiled) - before
