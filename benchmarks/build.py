"""`python -m benchmarks.build` measures build_index: the codebooks and codes of a prompt."""

import os

# Both frameworks share the GPU, and JAX reads this when it first touches it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import dataclasses
import datetime
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import clock as clocks
from benchmarks import machine
from benchmarks.clock import ClockError, KernelClock, Stream, summary
from benchmarks.files import (
    add_output_arguments,
    chosen_output,
    exit_status,
    fill,
    repeatable_command,
)
from benchmarks.implementations import TorchMemory
from benchmarks.measure import say
from benchmarks.programs import Forms, Program, compilers
from benchmarks.run import shape_of
from benchmarks.tables import build_table, show
from jax_indexer import PQIndex, build_index
from parity import oracle
from parity.inputs import WORKLOADS, Workload

BUILT = ("seed", "llama-128k-b4", "fine-128k-b4")
WITH_ORIGINAL = ("seed",)
CALLS = 3
SAMPLE = 64  # tokens of the first row whose codes are looked at


@dataclasses.dataclass(frozen=True)
class Builder:
    """One way to build an index, ready to be called: what the clock times.

    Attributes:
      call: launches it.
      call_recorded: launches it kernel by kernel.
      wait: blocks until it is done.
      trained: codebooks [K, M, C, D'] and codes [K, M, SAMPLE] of the first row.
      memory_bytes: beside the keys, at most.
      compile_seconds: None where nothing is compiled.
    """

    call: Callable[[], None]
    call_recorded: Callable[[], None]
    wait: Callable[[], None]
    trained: Callable[[], tuple[np.ndarray, np.ndarray]]
    memory_bytes: int | None
    compile_seconds: float | None


def keys_of(w: Workload) -> jax.Array:
    """Normal keys [B, S, K, H], drawn on the device."""
    shape = (w.B, w.capacity, w.K, w.H)
    return jax.jit(lambda: jax.random.normal(jax.random.key(w.seed), shape, w.dtype))()


def jax_program(w: Workload, forms: Forms) -> Program:
    """build_index under jit."""
    key = jax.ShapeDtypeStruct((w.B, w.capacity, w.K, w.H), jnp.dtype(w.dtype))
    lengths = jax.ShapeDtypeStruct((w.B,), np.int32)
    return Program(forms, lambda key, lengths: build_index(key, lengths, w.config), (key, lengths))


def jax_builder(w: Workload, key: jax.Array, program: Program) -> Builder:
    """Ours."""
    lengths = jnp.asarray(w.lengths, jnp.int32)
    index: PQIndex | None = None

    def launch(function: Callable[..., PQIndex]) -> None:
        nonlocal index
        index = function(key, lengths)

    def trained() -> tuple[np.ndarray, np.ndarray]:
        first = _sample_start(w)
        return np.asarray(index.codebooks[0]), np.asarray(
            index.codes[0, :, :, first : first + SAMPLE]
        )

    return Builder(
        lambda: launch(program.as_user),
        lambda: launch(program.recorded),
        lambda: jax.block_until_ready(index),
        trained,
        program.memory_bytes,
        program.seconds,
    )


def torch_builder(w: Workload, key: jax.Array) -> Builder:
    """The original's batched k-means, on the same keys."""
    import torch

    from torch_reference.kmeans import indexer_first

    keys = torch.from_dlpack(jax.block_until_ready(key.transpose(0, 2, 1, 3)))
    config = w.config
    found = None

    def call() -> None:
        nonlocal found
        found = indexer_first(
            keys,
            pq_group_factor=config.num_subspaces,
            pq_bits=config.num_bits,
            kmeans_iter=config.kmeans_iters,
            init_offset=config.first_trained,
            metric=config.metric,
        )

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def trained() -> tuple[np.ndarray, np.ndarray]:
        centroids, codes, _ = found
        first = _sample_start(w) - config.first_trained
        sample = codes[0, :, first : first + SAMPLE].cpu().numpy()
        return centroids[0].cpu().numpy(), sample.transpose(0, 2, 1)

    with TorchMemory() as memory:
        call()
    return Builder(call, call, wait, trained, memory.bytes, None)


def _sample_start(w: Workload) -> int:
    return max(w.lengths[0] - w.config.window_size - SAMPLE, w.config.first_trained)


def check(w: Workload, key: jax.Array, builder: Builder) -> float:
    """Checks the codes of a sample against exact distances.

    Returns:
      The squared error of the sample's reconstruction over its squared norm.

    Raises:
      AssertionError: naming the first code that is not the nearest centroid's.
    """
    codebooks, codes = builder.trained()
    first = _sample_start(w)
    sample = np.asarray(key[:1, first : first + SAMPLE].astype(jnp.float32))
    wanted, margin = (x[0] for x in oracle.encode(sample, codebooks[None]))
    wrong = np.argwhere((codes != wanted) & (margin > 1e-3))
    if len(wrong):
        head, m, token = wrong[0]
        raise AssertionError(
            f"kv head {head}, subspace {m}, token {first + token}: expected code "
            f"{wanted[head, m, token]}, got {codes[head, m, token]}"
        )
    nearest = np.take_along_axis(codebooks, codes[..., None].astype(np.int64), axis=2)
    parts = oracle.subvectors(sample, w.config.num_subspaces)[0]
    return float(np.square(parts - nearest).sum() / np.square(parts).sum())


def time_builder(builder: Builder, framework: str, clock: KernelClock | None) -> dict[str, Any]:
    """Wall-clock times of builds and, with a clock, their kernels'."""
    gc.collect()
    numbers: dict[str, Any] = {}
    with clocks.no_garbage_collection():
        numbers["call"] = summary(clocks.synchronised(builder, CALLS))
        if clock is None:
            return numbers
        stream = Stream(builder.call_recorded, builder.wait, framework, CALLS)
        (kernels,) = clock.record([stream], cold=False)
    calls = clocks.cut(kernels, CALLS, cold=False)
    numbers["warm"] = summary([sum(kernel.duration for kernel in call) for call in calls])
    numbers["launches"] = len(calls[0])
    if framework == "jax":
        numbers["append"] = summary(
            [
                sum(kernel.duration for kernel in call if kernel.name.startswith("append_kernel"))
                for call in calls
            ]
        )
    return numbers


def measure(
    w: Workload, programs: dict[str, Program], clock: KernelClock | None, options: str
) -> list[dict[str, Any]]:
    """The rows of one workload, as a results file has them."""
    key = jax.block_until_ready(keys_of(w))
    forms: dict[str, Callable[[], Builder]] = {
        "jax:build_index": lambda: jax_builder(w, key, programs[w.name])
    }
    if w.name in WITH_ORIGINAL and machine.version("torch"):
        forms["torch:indexer_first"] = lambda: torch_builder(w, key)
    rows = []
    for name, build in forms.items():
        row = {
            "workload": w.name,
            "shape": shape_of(w),
            "implementation": name,
            "framework": name.partition(":")[0],
            "status": "ok",
            "reason": None,
            "key_bytes": int(key.nbytes),
            "command": f"python -m benchmarks.build --workload {w.name}{options}",
        }
        say(f"{w.name}: {name}")
        try:
            builder = build()
            for launch in (builder.call, builder.call_recorded):
                launch()
                builder.wait()
                row["error"] = check(w, key, builder)
            row["compile_seconds"] = builder.compile_seconds
            row["memory_bytes"] = builder.memory_bytes
            row |= time_builder(builder, row["framework"], clock)
        except Exception as error:
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
            say(f"failed: {w.name}, {name}: {row['reason']}\n  repeat it: {row['command']}")
        rows.append(row)
    return rows


def chosen(arguments: argparse.Namespace) -> list[Workload]:
    """The workloads of a command line."""
    workloads = [WORKLOADS[name] for name in arguments.workload]
    if arguments.tokens is None:
        return workloads
    return [dataclasses.replace(w, L=arguments.tokens, S=None) for w in workloads]


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The command line and its parser; wrong usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.build", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=BUILT,
        default=BUILT,
        metavar="NAME",
        help=f"default: {', '.join(BUILT)}",
    )
    parser.add_argument("--tokens", type=int, help="of each prompt, instead of the workload's")
    add_output_arguments(parser)
    arguments = parser.parse_args(argv, argparse.Namespace(parser=parser))
    arguments.workload = list(dict.fromkeys(arguments.workload))
    if arguments.tokens is None and not machine.has_gpu():
        parser.error("no NVIDIA GPU: give fewer tokens to build on the CPU, as in --tokens 2048")
    configs = [WORKLOADS[name].config for name in arguments.workload]
    least = max(config.first_trained + SAMPLE + config.window_size for config in configs)
    if arguments.tokens is not None and arguments.tokens < least:
        parser.error(f"--tokens: expected at least {least}, got {arguments.tokens}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Builds what the command line asks for and writes a results file.

    Returns:
      0, or 1 if anything failed, or 130 if the user interrupted it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parsed(argv)
    started = time.perf_counter()
    now = datetime.datetime.now(datetime.UTC)
    default = f"build-{now.strftime('%Y%m%d-%H%M%S')}.json"
    output = chosen_output(arguments.output, default, arguments.parser)
    clock, failures = None, 0
    if not machine.has_gpu():
        say("No NVIDIA GPU: wall-clock times only.")
    else:
        try:
            clock = clocks.open_kernel_clock()
        except ClockError as error:
            failures += 1
            say(f"failed: no kernel times, since no profiler records this process: {error}")

    workloads = chosen(arguments)
    options = "" if arguments.tokens is None else f" --tokens {arguments.tokens}"
    results = {
        "kind": "build",
        "time": now.isoformat(timespec="seconds"),
        "command": repeatable_command(argv, "benchmarks.build"),
        **machine.find_commit(arguments.commit),
        "machine": machine.describe_machine(),
        "quick": False,
        "kernel_clock": clock.name if clock else None,
    }

    def rows_of_workloads() -> Iterator[list[dict[str, Any]]]:
        programs = compiled(workloads, recorded=clock is not None)
        for w in workloads:
            yield measure(w, programs, clock, options)

    interrupted = fill(output, results, rows_of_workloads(), started)
    show(f"build_index, {results['machine']['device']}", build_table(results["rows"]))
    say(f"{output} ({results['seconds']:.0f} s)")
    return exit_status(results, interrupted=interrupted, failures=failures)


def compiled(workloads: Sequence[Workload], *, recorded: bool) -> dict[str, Program]:
    """The program of each workload, compiled side by side before anything is timed."""
    with compilers() as pool:
        forms = Forms(pool, recorded=recorded)
        return {w.name: jax_program(w, forms) for w in workloads}


if __name__ == "__main__":
    sys.exit(main())
