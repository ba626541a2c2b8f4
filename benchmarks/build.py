"""Times build_index, which trains the codebooks and codes of a prompt, on normal keys."""

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results, torch_steps
from benchmarks.clock import Step
from benchmarks.jax_steps import Forms, Program, Programs
from benchmarks.measure import (
    Implementation,
    Repetitions,
    Row,
    Settings,
    measure_all,
    open_clock,
    plan_of,
)
from benchmarks.results import Plan
from jax_indexer import PQIndex, Rope, build_index
from parity import oracle
from parity.inputs import WORKLOADS, Workload

BUILT = ("seed", "llama-128k-b4", "fine-128k-b4")
WITH_ORIGINAL = ("seed",)
CALLS = Repetitions(warm=3, cold=0, calls=3, amortised=0, rounds=1)
QUICK = dataclasses.replace(CALLS, warm=1, calls=1)
LOOK_AHEAD = 4096  # tokens to decode, of what looks ahead
SAMPLE = 64  # tokens of the first row whose codes are looked at


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is built from.

    Attributes:
      workload: its shapes.
      key: normal keys [B, S, K, H], drawn on the device.
    """

    workload: Workload
    key: jax.Array

    @classmethod
    def of(cls, w: Workload) -> "Prompt":
        """The keys of a workload's seed."""
        shape = (w.B, w.capacity, w.K, w.H)
        draw = jax.jit(lambda: jax.random.normal(jax.random.key(w.seed), shape, w.dtype))
        return cls(w, jax.block_until_ready(draw()))

    @property
    def sample(self) -> slice:
        """The tokens whose codes are looked at."""
        config = self.workload.config
        start = self.workload.lengths[0] - config.window_size - SAMPLE
        start = max(start, config.first_trained)
        return slice(start, start + SAMPLE)


class Build(Step):
    """One way to build an index."""

    def __init__(self, prompt: Prompt, **numbers: Any):
        self.prompt = prompt
        self.numbers = {"key_bytes": int(prompt.key.nbytes), **numbers}

    def trained(self) -> tuple[np.ndarray, np.ndarray]:
        """Codebooks [K, M, C, D'] and codes [K, M, SAMPLE] of the first row."""
        raise NotImplementedError

    def check(self, reference):
        """Raises AssertionError unless codes are those of the nearest centroids; notes the error.

        That is the squared error of the sample's reconstruction over its squared norm.
        """
        codebooks, codes = self.trained()
        tokens = reference.sample
        sample = np.asarray(reference.key[:1, tokens].astype(jnp.float32))
        wanted, margin = (x[0] for x in oracle.encode(sample, codebooks[None]))
        wrong = np.argwhere((codes != wanted) & (margin > 1e-3))
        if len(wrong):
            head, m, token = wrong[0]
            raise AssertionError(
                f"kv head {head}, subspace {m}, token {tokens.start + token}: expected code "
                f"{wanted[head, m, token]}, got {codes[head, m, token]}"
            )
        nearest = np.take_along_axis(codebooks, codes[..., None].astype(np.int64), axis=2)
        parts = oracle.subvectors(sample, reference.workload.config.num_subspaces)[0]
        self.numbers["error"] = float(np.square(parts - nearest).sum() / np.square(parts).sum())


def jax_programs(w: Workload, forms: Forms, *, copies: int) -> Programs:
    """build_index under jit."""
    ahead = {}
    if copies:
        rope = Rope.from_base(500_000.0, w.H)
        ahead = {"rope": rope, "look_ahead": LOOK_AHEAD, "copies": copies}
    key = jax.ShapeDtypeStruct((w.B, w.capacity, w.K, w.H), jnp.dtype(w.dtype))
    lengths = jax.ShapeDtypeStruct((w.B,), np.int32)
    build = lambda key, lengths: build_index(key, lengths, w.config, **ahead)  # noqa: E731
    return {"build": Program(forms, build, (key, lengths))}


class JaxBuild(Build):
    """Ours."""

    index: PQIndex

    def __init__(self, prompt: Prompt, programs: Programs):
        self._program = programs["build"]
        super().__init__(prompt, **self._program.numbers)
        self._inputs = prompt.key, jnp.asarray(prompt.workload.lengths, jnp.int32)

    def call(self):
        self.index = self._program.as_user(*self._inputs)

    def call_recorded(self):
        self.index = self._program.recorded(*self._inputs)

    def wait(self):
        jax.block_until_ready(self.index)

    def trained(self):
        codes = self.index.codes[0, :, :, self.prompt.sample]
        return np.asarray(self.index.codebooks[0]), np.asarray(codes)


class TorchBuild(Build):
    """The original's batched k-means, on the same keys."""

    def __init__(self, prompt: Prompt, programs: Programs):
        import torch

        self._keys = torch.from_dlpack(jax.block_until_ready(prompt.key.transpose(0, 2, 1, 3)))
        super().__init__(prompt)
        self.numbers["memory_bytes"] = torch_steps.memory_of(self.call)

    def call(self):
        from torch_reference.kmeans import indexer_first

        config = self.prompt.workload.config
        self._found = indexer_first(
            self._keys,
            pq_group_factor=config.num_subspaces,
            pq_bits=config.num_bits,
            kmeans_iter=config.kmeans_iters,
            init_offset=config.first_trained,
            metric=config.metric,
        )

    def wait(self):
        torch_steps.synchronize()

    def trained(self):
        centroids, codes, _ = self._found
        start = self.prompt.sample.start - self.prompt.workload.config.first_trained
        sample = codes[0, :, start : start + SAMPLE].cpu().numpy()
        return centroids[0].cpu().numpy(), sample.transpose(0, 2, 1)


OURS = [
    Implementation(
        f"jax:build_index{f', copies={copies}' * bool(copies)}",
        JaxBuild,
        functools.partial(jax_programs, copies=copies),
        needs_gpu=False,
    )
    for copies in (0, 2, 3)
]
ORIGINAL = Implementation("torch:indexer_first", TorchBuild, needs_gpu=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `build`."""
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=BUILT,
        default=BUILT,
        metavar="NAME",
        help=f"default: {', '.join(BUILT)}",
    )
    parser.add_argument("--tokens", type=int, help="of each prompt, instead of the workload's")


def plan(arguments: argparse.Namespace) -> Plan:
    """What a command line of `build` asks for; ValueError if it cannot be."""
    workloads = [WORKLOADS[name] for name in dict.fromkeys(arguments.workload)]
    tokens = arguments.tokens
    if tokens is None and not results.has_gpu():
        raise ValueError(
            "no NVIDIA GPU: give fewer tokens to build on the CPU, as in --tokens 2048"
        )
    configs = [w.config for w in workloads]
    least = max(config.first_trained + SAMPLE + config.window_size for config in configs)
    if tokens is not None and tokens < least:
        raise ValueError(f"--tokens: expected at least {least}, got {tokens}")
    table = []
    for w in workloads:
        forms = [*OURS, ORIGINAL] if w.name in WITH_ORIGINAL else OURS
        if tokens is not None:
            w = dataclasses.replace(w, name=f"{w.name} --tokens {tokens}", L=tokens, S=None)
        table.append([Row(w, form, "build") for form in forms])

    def measured(plan: Plan) -> Iterator[None]:
        calls = QUICK if arguments.quick else CALLS
        return measure_all(table, Settings(Prompt.of, calls, open_clock(plan)))

    return plan_of("build", "build", table, measured)
