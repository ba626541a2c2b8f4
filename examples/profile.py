"""Profiles a step that decodes a token, full and sparse: `python -m examples.profile`.

Weights and what the cache holds are random: any shapes can be measured.
"""

import argparse
import dataclasses
import functools
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from rich.console import Console
from rich.table import Table

from benchmarks.clock import (
    LEAD,
    Kernel,
    KernelClock,
    Step,
    Stream,
    amortised,
    stages_of,
)
from benchmarks.jax_steps import Forms, Program, compilers
from benchmarks.results import (
    Row,
    describe_machine,
    find_commit,
    has_gpu,
    output_path,
    repeatable,
    write,
)
from examples.model import (
    Attend,
    Layer,
    Model,
    Parameters,
    attention,
    forward,
    index_prompts,
    logits_of,
    turns,
)
from examples.model import write as write_tokens
from examples.options import named, plain
from jax_indexer import DecodeCache, IndexerConfig, Rope, empty_cache
from parity.real_keys import Failure

DTYPE = jnp.dtype(jnp.bfloat16)
OPTIONS = ("full", "fast", "balanced")
SHARES = ("matrices", "attention", "copies", "sampling", "other")
ROOM = 512  # tokens that are free before the first step: more than there are steps
WARM_UPS, RECORDED, CALLS = 5, 30, 100


class Case(NamedTuple):
    """A model's shapes, as long as its context; E, F and V are those of `examples.model`."""

    model: Model
    E: int
    F: int
    V: int
    has_biases: bool = False
    is_tied: bool = True


def case(tokens: int, sizes: tuple[int, ...], base: float, pairs: str, *rest: Any) -> Case:
    """A case; the sizes are layers, heads, kv heads and head dimension."""
    rope = Rope.from_base(base, sizes[3], pairs)
    return Case(Model(*sizes, rope=rope, norm_epsilon=1e-5, context=tokens), *rest)


SMOLLM2 = (30, 9, 3, 64), 1e5, "interleaved", 576, 1536, 49152
CASES = {
    "smollm2-8k": case(8192, *SMOLLM2),
    "smollm2-32k": case(32768, *SMOLLM2),
    "smollm2-128k": case(131072, *SMOLLM2),
    "qwen2.5-1.5b-32k": case(32768, (28, 12, 2, 128), 1e6, "half", 1536, 8960, 151936, True),
    "llama-3-8b-128k": case(
        131072, (32, 32, 8, 128), 5e5, "half", 4096, 14336, 128256, False, False
    ),
}


# What is run


def shapes_of(of: Case) -> Parameters:
    """Shapes of its parameters."""
    (model, E, F, V), shape = of[:4], functools.partial(jax.ShapeDtypeStruct, dtype=DTYPE)
    n, N, K, H = model.layers, model.heads, model.kv_heads, model.head_dim
    layers = Layer(
        attention_norm=shape((n, E)),
        query=shape((n, N, H, E)),
        key=shape((n, K, H, E)),
        value=shape((n, K, H, E)),
        query_bias=shape((n, N, H)) if of.has_biases else None,
        key_bias=shape((n, K, H)) if of.has_biases else None,
        value_bias=shape((n, K, H)) if of.has_biases else None,
        output=shape((n, E, N, H)),
        feed_forward_norm=shape((n, E)),
        gate=shape((n, F, E)),
        up=shape((n, F, E)),
        down=shape((n, E, F)),
    )
    embedding = shape((V, E))
    angles = jax.eval_shape(lambda: turns(model.rope, model.context))
    return Parameters(embedding, layers, shape((E,)), embedding, *angles)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def random(seed: int, shape: tuple[int, ...], dtype: Any, scale: float) -> Array:
    """Normal numbers; of stacked layers one layer's at a time, whose bits take more memory."""

    def draw(key, shape):
        return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)

    key = jax.random.key(seed)
    if len(shape) < 3:
        return draw(key, shape)
    return lax.map(lambda key: draw(key, shape[1:]), jax.random.split(key, shape[0]))


def random_parameters(of: Case) -> Parameters:
    """Of a size that keeps activations at 1; embeddings are one array where the model has one."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes_of(of))
    drawn = []
    for seed, (path, x) in enumerate(leaves):
        scale = 1.0 if "norm" in jax.tree_util.keystr(path) else of.E**-0.5
        drawn.append(random(seed, x.shape, x.dtype, scale))
    cos, sin = turns(of.model.rope, of.model.context)
    parameters = jax.tree.unflatten(tree, drawn)._replace(cos=cos, sin=sin)
    return parameters._replace(unembedding=parameters.embedding) if of.is_tied else parameters


def cudnn_attention(query, key, value, cache, *, counts, layer):
    """Full attention of one token by cuDNN, the fastest there is."""
    cache, _ = write_tokens(key, value, cache, counts, layer)
    with jax.numpy_dtype_promotion("standard"):  # which it needs
        out = jax.nn.dot_product_attention(
            query,
            cache.key[layer],
            cache.value[layer],
            key_value_seq_lengths=cache.index.lengths[layer],
            implementation="cudnn",
        )
    return out, cache


def generate(
    parameters: Parameters, token: Array, cache: DecodeCache, model: Model, attend: Attend
) -> tuple[Array, DecodeCache]:
    """The likeliest token after another one, int32[1, 1]."""

    def attend_in_scope(*arrays, **of):
        with jax.named_scope("attention"):
            return attend(*arrays, **of)

    x, cache = forward(parameters, token, None, cache, model, attend_in_scope)
    logits = logits_of(parameters, x)
    with jax.named_scope("sampling"):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache


class Programs(NamedTuple):
    """What an option compiles: a step, and what trains codebooks, if it has some."""

    config: IndexerConfig | None
    step: Program
    train: Program | None


def compiling(of: Case, option: str, pool: ThreadPoolExecutor) -> Programs:
    """Starts to compile an option."""
    config = None if option == "full" else named(of.model.rope)[option].config
    attend = cudnn_attention if config is None else attention(config)
    step = functools.partial(generate, model=of.model, attend=attend)
    cache = jax.eval_shape(lambda: new_cache(of, config))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    both, arguments = Forms(pool, user=True, recorded=True), (shapes_of(of), token, cache)
    programs = Programs(config, Program(both, step, arguments, donate="cache"), None)
    if config is None:
        return programs

    def train(cache, lengths):
        return index_prompts(cache, jnp.ones(1, bool), config, lengths=lengths)

    arguments = cache, jax.ShapeDtypeStruct((1,), jnp.int32)
    return programs._replace(train=Program(Forms(pool), train, arguments, donate="cache"))


def new_cache(of: Case, config: IndexerConfig | None) -> DecodeCache:
    """An empty one, as long as the context."""
    sizes = 1, of.model.context, of.model.kv_heads, of.model.head_dim
    return empty_cache(config or plain(), *sizes, dtype=DTYPE, layers=of.model.layers)


class Decode(Step):
    """Steps of an option, each from the token of the one before, behind random tokens."""

    def __init__(self, of: Case, programs: Programs, parameters: Parameters):
        self._programs, self._parameters = programs, parameters
        self._token = jnp.zeros((1, 1), jnp.int32)
        cache = jax.eval_shape(lambda: new_cache(of, programs.config))
        index = jax.jit(lambda: new_cache(of, programs.config).index)()
        key, value = (random(i, cache.key.shape, DTYPE, 1.0) for i in range(2))
        lengths = np.full(1, of.model.context - ROOM, np.int32)
        if programs.train:
            self._cache = programs.train.as_user(DecodeCache(key, value, index), lengths)
        else:
            index = dataclasses.replace(index, lengths=jnp.full_like(index.lengths, lengths[0]))
            self._cache = DecodeCache(key, value, index)

    def _launch(self, function: Callable[..., Any]) -> None:
        self._token, self._cache = function(self._parameters, self._token, self._cache)

    def call(self):
        self._launch(self._programs.step.as_user)

    def call_recorded(self):
        self._launch(self._programs.step.recorded)

    def wait(self):
        jax.block_until_ready((self._token, self._cache))


# What its kernels are for

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
LIBRARY_MATRICES = re.compile(r"nvjet|gemm|gemv|cutlass|cublas|splitk", re.IGNORECASE)
MOVES = re.compile(r"memcpy|copy|dynamic_slice", re.IGNORECASE)


def operations(hlo: str) -> dict[str, set[str]]:
    """Of each kernel name in a compiled program, what it computes: JAX's names of operations."""
    inside: dict[str, set[str]] = {}  # of computations
    kernels: dict[str, set[str]] = {}
    calls: dict[str, str] = {}
    computation = ""
    for line in hlo.splitlines():
        if found := COMPUTATION.match(line):
            computation = found[1]
        elif found := INSTRUCTION.match(line):
            names = set(re.findall(r'op_name="([^"]*)"', line))
            inside.setdefault(computation, set()).update(names)
            name = re.sub(r"[.-]", "_", found[1])
            kernels[name] = names
            if called := re.search(r"calls=%?([\w.-]+)", line):
                calls[name] = called[1]
    return {name: ops | inside.get(calls.get(name, ""), set()) for name, ops in kernels.items()}


def share_of(kernel: Kernel, of_program: dict[str, set[str]]) -> str:
    """Which of SHARES a kernel belongs to, by its name and by what the program says of it."""
    name = kernel.name
    if stages_of([kernel], "jax")[0] not in ("other", "top-k") or "cudnn" in name.lower():
        return "attention"
    found = of_program.get(name, set())
    outside = [x for x in found if "/attention/" not in x]
    if any(x.endswith("dot_general") for x in outside):
        return "matrices"
    if MOVES.search(name) and "update" not in name:
        return "copies"
    if len(outside) < len(found):
        return "attention"
    if any("/sampling/" in x for x in found):
        return "sampling"
    return "matrices" if LIBRARY_MATRICES.search(name) else "other"


def breakdown(kernels: Sequence[Kernel], calls: int, of_program: dict[str, set[str]]) -> Row:
    """Microseconds a call of each share, of all, and of each kernel by its name."""
    shares, names = dict.fromkeys(SHARES, 0.0), {}
    for kernel in kernels:
        share = share_of(kernel, of_program)
        shares[share] += kernel.duration / calls
        us, count, _ = names.get(kernel.name, (0.0, 0, share))
        names[kernel.name] = us + kernel.duration / calls, count + 1 / calls, share
    longest = sorted(names.items(), key=lambda item: -item[1][0])
    return {
        "kernels_us": sum(shares.values()),
        "shares_us": shares,
        "kernels": [[name[:80], us, count, share] for name, (us, count, share) in longest],
    }


# What is measured


def measured(
    name: str, option: str, programs: Programs, parameters: Parameters, clock: KernelClock
) -> Row:
    """A row of the results."""
    of = CASES[name]
    step = Decode(of, programs, parameters)
    for _ in range(WARM_UPS):
        step.call()
        step.call_recorded()
    step.wait()
    wall = float(np.median([amortised(step, CALLS) for _ in range(3)]))
    stream = Stream(step.call_recorded, step.wait, "jax", RECORDED)
    (kernels,) = clock.record([stream], cold=False)
    hlo = programs.step.recorded.as_text()
    found = breakdown(kernels, LEAD + RECORDED, operations(hlo))
    return {
        "case": name,
        "option": option,
        "tokens": of.model.context,
        "layers": of.model.layers,
        "tokens_a_second": 1e6 / wall,
        "wall_us": wall,
        "gaps_us": wall - found["kernels_us"],
        "attention_us_a_layer": found["shares_us"]["attention"] / of.model.layers,
        **found,
    }


def tried(what: str, function: Callable[..., Any], console: Console) -> Any:
    """What the function returns; None where it fails, which is said."""
    console.print(what)
    try:
        return function()
    except Exception as problem:
        console.print(f"{what} failed: {problem!r}"[:2000], style="red", markup=False)
        return None


def profile(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The results file, which is written after each row."""
    began = time.perf_counter()
    results = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": repeatable(arguments.words, "examples.profile"),
        **find_commit(arguments.commit),
        "machine": describe_machine(),
        "measure": "profile",
        "weights": "random",
        "dtype": DTYPE.name,
        "rows": [],
    }
    clock, programs = KernelClock(), {}
    with compilers() as pool:  # all of them first: on a GPU they would disturb what is timed
        for name in arguments.case:
            for option in arguments.option:
                start = functools.partial(compiling, CASES[name], option, pool)
                programs[name, option] = tried(f"compiling {name}, {option}", start, console)
    for name in arguments.case:
        parameters = random_parameters(CASES[name])
        for option in arguments.option:
            if of_option := programs.pop((name, option)):
                run = functools.partial(measured, name, option, of_option, parameters, clock)
                row = tried(f"{name}, {option}", run, console)
                results["rows"] += [row] if row else []
            results["seconds"] = round(time.perf_counter() - began)
            if arguments.output:
                write(arguments.output, results)
    return results


def table(rows: Sequence[Row]) -> Table:
    """Rows as a table, in microseconds a token."""
    heads = ("case", "option", "tokens/s", "wall clock", *SHARES, "gaps", "attention a layer")
    table = Table(*heads, caption="microseconds a token; random weights and caches")
    for row in rows:
        times = row["wall_us"], *row["shares_us"].values(), row["gaps_us"]
        numbers = row["tokens_a_second"], *times, row["attention_us_a_layer"]
        table.add_row(row["case"], row["option"], *(f"{x:.1f}" for x in numbers))
    return table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.profile", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--option", nargs="+", choices=OPTIONS, default=OPTIONS)
    parser.add_argument("--output", type=Path, help="a .json file for the rows")
    parser.add_argument("--commit", help="where git does not tell: of the code that is measured")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Failure where nothing can be measured, or written."""
    if not has_gpu():
        raise Failure(
            "a profile is of the kernels of an NVIDIA GPU, and JAX sees none; how fast a model "
            "decodes elsewhere says python -m examples.generate"
        )
    if importlib.util.find_spec("torch") is None:
        raise Failure("PyTorch's profiler reads the kernel times: python -m pip install torch")
    if arguments.output:
        try:
            output_path(arguments.output, "")
        except ValueError as problem:
            raise Failure(str(problem)) from None


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    arguments = make_parser().parse_args(words, argparse.Namespace(words=words))
    console = Console(stderr=True)
    try:
        check(arguments)
    except Failure as problem:
        console.print(str(problem), style="red", markup=False, soft_wrap=True)
        return 1
    rows = profile(arguments, console)["rows"]
    Console(width=140).print(table(rows))
    return int(len(rows) < len(arguments.case) * len(arguments.option))


if __name__ == "__main__":
    sys.exit(main())
