"""What a result was measured on and with: device, driver, versions, commit."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import jax

ROOT = Path(__file__).parent.parent


def _output(*command: str) -> str | None:
    """What a command prints, or None if it is not there or fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def has_gpu() -> bool:
    """Whether JAX sees an NVIDIA GPU."""
    return any(device.platform == "gpu" for device in jax.devices())


def describe_machine() -> dict[str, str | bool | None]:
    """The device that numbers belong to, and the software; None for what is not known."""
    gpu = has_gpu()
    if gpu:
        device = jax.devices()[0].device_kind
        fields = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = fields.splitlines()[0] if fields else None
    else:
        device, driver = f"CPU: {_processor()}", None
    return {
        "device": device,
        "gpu": gpu,
        "driver": driver,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "torch", "triton", "numpy")},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version(name: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_commit(given: str | None) -> dict[str, str | bool | None]:
    """The commit that is measured, and whether files differ from it.

    Args:
      given: what the command line says, for a machine that has the files but not the history;
        "-dirty" at its end says that files differ.

    Returns:
      `commit` and `dirty`; None where not known.
    """
    if given is not None:
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if commit is None or changes is None else changes != ""}


@functools.cache
def device_bytes() -> int:
    """Memory of the GPU, or of the machine without one."""
    if has_gpu():
        stats = jax.devices()[0].memory_stats() or {}
        total = _output("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
        if total:
            return int(total.splitlines()[0]) * 2**20
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"])
    return host_bytes()


def host_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
