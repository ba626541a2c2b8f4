"""Rows split over devices, each check of `parity.sequence` in a process with host devices."""

import os
import subprocess
import sys

import pytest


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
    "what", ["lists", "life", "training", "kernels", "programs", "messages", "hosts"]
)
def test_rows_split_over_devices(what):
    run(what)


def test_random_meshes(request):
    """`--meshes 100` for as many as were run before this was merged, of which 8 take 40 s."""
    run("meshes", "--number", str(request.config.getoption("--meshes")))
