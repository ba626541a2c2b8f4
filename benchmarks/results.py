"""Results: what they were measured on, their rows, and the files they go to."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from parity.inputs import Workload

ROOT = Path(__file__).parent.parent
LOCAL = Path(__file__).parent / "local"  # not committed
KINDS = ("named", "sweep", "layer", "build", "decode", "devices", "host", "quality")
KEYS = {"time", "command", "commit", "dirty", "machine", "quick", "seconds", "rows"}

Results = dict[str, Any]  # one file
Row = dict[str, Any]


# What numbers belong to


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


def version(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine() -> dict[str, str | bool | int | None]:
    """The device that numbers belong to, and the software; None for what is not known."""
    gpu = has_gpu()
    driver = gpu and _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": jax.devices()[0].device_kind if gpu else f"CPU: {_processor()}",
        "gpu": gpu,
        "driver": driver.splitlines()[0] if driver else None,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "torch", "triton", "numpy", "faiss-cpu")},
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def find_commit(given: str | None) -> dict[str, str | bool | None]:
    """`commit` and `dirty`, whether files differ from it; None where not known.

    Args:
      given: what the command line says, for a machine that has the files but not the history;
        "-dirty" at its end says that files differ.
    """
    if given is not None:
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if commit is None or changes is None else changes != ""}


def host_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# What is measured


@dataclasses.dataclass
class Plan:
    """What a command line asks for, found right before anything is measured.

    Attributes:
      kind: of the results, one of KINDS.
      name: of the results file, behind the device's.
      rows: gives them as they are by now.
      measure: measures, and yields whenever rows are worth keeping.
      about: what else the file says.
      problems: what failed beside rows.
    """

    kind: str
    name: str
    rows: Callable[[], list[Row]]
    measure: Callable[["Plan"], Iterator[None]]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    def failed(self, what: str) -> None:
        """Notes what failed beside rows, and says so."""
        print(f"failed: {what}", flush=True)
        self.problems.append(what)


def framework_of(implementation: str) -> str:
    """The framework that an implementation's name begins with."""
    return re.split("[.:]", implementation)[0]


def is_indexer(implementation: str) -> bool:
    """Whether a name is that of an indexer; a library's own name is that of a top-k alone."""
    return ":" in implementation


def command_of(kind: str, workload: str, implementation: str) -> str:
    """The command that repeats a row: a workload's name is what the command line takes."""
    command = {"named": "run", "sweep": "run"}.get(kind, kind)
    which = f" --implementation {implementation}" * (command in ("run", "layer"))
    return f"python -m benchmarks {command} --workload {workload}{which}"


def repeatable(argv: Sequence[str], program: str = "benchmarks") -> str:
    """A program's command line, less the commit and this machine's paths: they measure nothing."""
    kept, words = [], iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in ("--output", "--commit", "--real-keys"):
            kept.append(word)
            continue
        if not equals:
            next(words)
        if name == "--real-keys":
            kept += [name, "DIR"]
    return shlex.join(["python", "-m", program, *kept])


def shape_of(workload: Workload) -> dict[str, Any]:
    """A workload's sizes, for a results file."""
    sizes = dataclasses.asdict(workload)
    del sizes["name"]
    config = sizes.pop("config")
    config["table_dtype"] = np.dtype(config["table_dtype"]).name
    config["init_offset"] = workload.config.first_trained
    return sizes | {"S": workload.capacity, "config": config}


# Files


def output_path(chosen: Path | None, name: str) -> Path:
    """Where results go, made ready: `--output`, or the file of that name in benchmarks/local/.

    Raises:
      ValueError: if it cannot be written.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = LOCAL / f"{slug}.json" if chosen is None else chosen
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"--output: expected a file that can be written, got {path}: {error}"
        ) from None
    return path


def _rounded(value: Any) -> Any:
    """Numbers with five figures, in whatever they are."""
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(x) for x in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _rounded(value.tolist())
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(path: Path, results: Results) -> None:
    """Writes a results file: JSON, one row a line, numbers with five figures."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(_rounded(results[key]))}"
        for key in results
        if key != "rows"
    ]
    rows = ",\n".join(json.dumps(_rounded(row)) for row in results["rows"])
    path.write_text("{\n" + ",\n".join([*lines, f'"rows": [\n{rows}\n]']) + "\n}\n")


def load(files: Iterable[Path]) -> list[Results]:
    """Reads results files, the oldest first; each remembers its name.

    Raises:
      ValueError: for a file that holds no results of a kind in KINDS, and for times of several
        kinds of device that would stand in one table.
    """
    results = [_read(file) for file in files]
    found: dict[tuple[Any, ...], dict[str, list[str]]] = {}
    for one in results:
        for table in _tables_of(one) if one["kind"] != "quality" else ():
            devices = found.setdefault(table, {})
            devices.setdefault(one["machine"]["device"], []).append(one["file"])
    for devices in found.values():
        if len(devices) > 1:
            raise ValueError(
                "numbers of different devices are not compared; name the files of one of them: "
                + "; ".join(f"{device}: {', '.join(names)}" for device, names in devices.items())
            )
    return sorted(results, key=lambda one: (one["time"], one["file"]))


def _tables_of(one: Results) -> set[tuple[Any, ...]]:
    """What rows stand beside: others of their kind, sweep and number of devices; scans apart."""
    kind, rows = one["kind"], one["rows"]
    most = max((row.get("devices", 1) for row in rows), default=1)
    return {
        (kind, row.get("sweep"), most, kind == "layer" and in_scan(one, row["workload"]))
        for row in rows
    }


def in_scan(one: Results, workload: str) -> bool:
    """Whether a layer's workload is of many layers or steps in one jit."""
    shape = one["workloads"][workload]
    return bool(shape["layers"]) or shape["steps"] > 1


def _read(file: Path) -> Results:
    try:
        results = json.loads(file.read_text())
        kind, missing = results.get("kind"), KEYS - results.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: expected a results file of this program: {error}") from None
    if kind not in KINDS:
        raise ValueError(f"{file}: expected results of a kind in {', '.join(KINDS)}, got {kind}")
    if missing:
        raise ValueError(f"{file}: expected {', '.join(sorted(missing))} too, got none of these")
    return results | {"file": file.name}
