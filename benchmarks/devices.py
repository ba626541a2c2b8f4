"""Times whole layers of decoding on one device and on several: rows, heads or tokens are split.

First the lists of all devices together are held to those of one, for every split.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import results
from benchmarks.jax_steps import NO_COMMAND_BUFFERS, compilers
from benchmarks.measure import say
from benchmarks.results import Plan
from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    PQIndex,
    build_index,
    decode_attention,
    empty_cache,
    partition_specs,
    select,
    with_cells,
)

AXES = "rows", "heads", "tokens"
# "both": half as many devices along tokens, and two along heads; "part": one device, with the work
# that each of all has.
WAYS = "tokens", "heads", "both", "rows", "part"
WAYS_DRAWN = {
    frozenset({"tokens"}): "tokens split",
    frozenset({"heads"}): "heads split",
    frozenset({"heads", "tokens"}): "heads over 2, tokens over the rest",
    frozenset({"rows"}): "rows split",
}
HEADS, KV_HEADS, DIMENSIONS = 32, 8, 128  # those of llama-128k-b4
# Of a layer on one device: room is left for what a program needs beside its cache.
MOST_BYTES = 60e9
STEPS, QUICK_STEPS = 128, 8
UNROLL = 4  # XLA makes a CUDA graph from five launches on
REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, and the devices that share it.

    Attributes:
      rows, tokens: of the cache, of all devices.
      split: over how many devices rows, heads and tokens are split.
      share: what part of the rows, heads and tokens there is, for the work of one of several
        devices on one device.
    """

    rows: int
    tokens: int
    split: tuple[int, int, int] = (1, 1, 1)
    share: tuple[int, int, int] = (1, 1, 1)

    @property
    def devices(self) -> int:
        return int(np.prod(self.split))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, N, K and S."""
        rows, heads, tokens = self.share
        return self.rows // rows, HEADS // heads, KV_HEADS // heads, self.tokens // tokens

    @property
    def name(self) -> str:
        """What is shared, by how many."""
        parts = zip(AXES, self.split, strict=True)
        split = " x ".join(f"{name} over {number}" for name, number in parts if number > 1)
        parts = zip(AXES, self.share, strict=True)
        share = ", ".join(f"1/{number} of the {name}" for name, number in parts if number > 1)
        return split or (f"one with {share}" if share else "one")

    @property
    def fits(self) -> bool:
        B, _, K, S = self.sizes
        return B * K * S * (4 * DIMENSIONS + 6) / self.devices < MOST_BYTES

    def mesh(self) -> Mesh:
        devices = np.asarray(jax.devices()[: self.devices]).reshape(self.split)
        return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)

    @property
    def axes(self) -> tuple[str | None, str | None, str | None]:
        """The axes that rows, heads and tokens are split over."""
        rows, heads, tokens = (
            name if number > 1 else None for name, number in zip(AXES, self.split, strict=True)
        )
        return rows, heads, tokens

    @property
    def axis(self) -> str | None:
        return self.axes[2]

    @property
    def of_query(self) -> P:
        """How queries and new keys are split."""
        return P(self.axes[0], None, self.axes[1])

    def of_cache(self, cache: Any) -> Any:
        """How a cache is."""
        rows, heads, tokens = self.axes
        return partition_specs(cache, self.mesh(), rows=rows, heads=heads, sequence=tokens)


def cases_of(rows: int, tokens: int, devices: int, ways: Sequence[str] = WAYS) -> list[Case]:
    """One device, each way of splitting, and the work of one device alone."""
    found = [Case(rows, tokens)]
    counts = [n for n in (2, 4, 8) if n <= devices]
    for n in counts:
        split_by = {"tokens": (1, 1, n), "heads": (1, n, 1)}
        split_by |= {"rows": (n, 1, 1)} if rows % n == 0 else {}
        split_by |= {"both": (1, 2, n // 2)} if n > 2 else {}
        splits = [split for way, split in split_by.items() if way in ways]
        found += [Case(rows, tokens, split) for split in splits]
        if n == counts[-1] and "part" in ways:
            found += [Case(rows, tokens, share=split) for split in splits]
    return [case for case in dict.fromkeys(found) if case.fits]


# Programs


def on_mesh(case: Case, function: Callable, ins: Any, outs: Any) -> Callable:
    """In a shard_map over the case's mesh; as it is on one device."""
    return jax.shard_map(function, mesh=case.mesh(), in_specs=ins, out_specs=outs)


def shapes_of(case: Case, config: IndexerConfig) -> DecodeCache:
    """The cache of a case without cells, by its shapes."""
    B, _, K, S = case.sizes
    plain = dataclasses.replace(config, cells=False)
    return jax.eval_shape(lambda: empty_cache(plain, B, S, K, DIMENSIONS))


def cells_made(case: Case, config: IndexerConfig) -> Callable[[PQIndex], PQIndex]:
    """Makes the state of cells on each device."""

    def make(index):
        return with_cells(index, config, sequence_axis=case.axis)

    bare = shapes_of(case, config).index
    B, _, K, S = case.sizes
    own = jax.eval_shape(lambda: empty_cache(config, B, S, K, DIMENSIONS)).index
    return on_mesh(case, make, (case.of_cache(bare),), case.of_cache(own))


def decoding(case: Case, config: IndexerConfig, steps: int, cache: Any) -> Callable:
    """Steps of a layer in a scan: the mean of outputs keeps them, and the cache."""

    def run(cache, query, new):
        def step(carry, _):
            cache, query = carry
            out, cache = decode_attention(query, new, new, cache, config, sequence_axis=case.axis)
            return (cache, query + 1e-3 * out), None

        (cache, query), _ = lax.scan(step, (cache, query), None, steps, unroll=UNROLL)
        return cache, query

    of_cache, whole = case.of_cache(cache), case.of_query
    return on_mesh(case, run, (of_cache, whole, whole), (of_cache, whole))


def listing(case: Case, config: IndexerConfig, index: Any) -> Callable:
    """Lists of whole rows: positions of all devices beside one another."""

    def run(index, query):
        found = select(query, index, config, sequence_axis=case.axis).indices
        if case.axis is None:
            return found
        offset = lax.axis_index(case.axis) * index.codes.shape[-1]
        return jnp.where(found >= 0, found + offset, -1)

    outs = P(*case.of_query, case.axis)
    return on_mesh(case, run, (case.of_cache(index), case.of_query), outs)


def training(case: Case, config: IndexerConfig) -> Callable:
    """Codebooks and codes of the keys of a cache."""

    def run(key, lengths):
        index = build_index(key, lengths, config, sequence_axis=case.axis)
        return index.codebooks, index.codes

    rows, heads, tokens = case.axes
    outs = P(rows, heads), P(rows, heads, None, tokens)
    return on_mesh(case, run, (P(rows, tokens, heads), P(rows)), outs)


# Inputs


def drawn(
    case: Case, config: IndexerConfig, room: int, *, without_keys: bool = False
) -> tuple[DecodeCache, jax.Array, jax.Array]:
    """A cache, a query and new keys: the same numbers however they are split."""
    B, N, K, S = case.sizes
    specs, mesh = case.of_cache(shapes_of(case, config)), case.mesh()
    none = {"key": None, "value": None} if without_keys else {}
    specs = dataclasses.replace(specs, **none)

    def make():
        keys = jax.random.split(jax.random.key(0), 6)
        normal = lambda i, *shape: jax.random.normal(keys[i], shape, jnp.bfloat16)  # noqa: E731
        M, C = config.num_subspaces, config.num_centroids
        codebooks = jax.random.normal(keys[0], (B, K, M, C, DIMENSIONS // M))
        codes = jax.random.randint(keys[1], (B, K, M, S), 0, C, jnp.int32).astype(jnp.uint8)
        index = PQIndex(codebooks, codes, jnp.full(B, S - room, jnp.int32), capacity=S)
        of_cache = B, S, K, DIMENSIONS
        cache = DecodeCache(normal(2, *of_cache), normal(3, *of_cache), index)
        cache = dataclasses.replace(cache, **none)
        return cache, normal(4, B, 1, N, DIMENSIONS), normal(5, B, 1, K, DIMENSIONS)

    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), (specs, case.of_query, case.of_query)
    )
    return jax.jit(make, out_shardings=places)()


def lists_of_one(case: Case, config: IndexerConfig, room: int) -> np.ndarray:
    """Lists of the layer by one device, which need not have room for keys and values."""
    one = Case(case.rows, case.tokens)
    cache, query, _ = drawn(one, config, room, without_keys=True)
    index = jax.jit(cells_made(one, config), donate_argnums=0)(cache.index)
    return np.asarray(jax.jit(listing(one, config, index))(index, query))


# Measurements


def best_of(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the quickest call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def kernels_by_device(run: Callable[[], Any], steps: int) -> dict[int, dict[str, float]]:
    """Microseconds a step of each kernel, by device."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        time.sleep(0.01)
        jax.block_until_ready(run())
        time.sleep(0.01)
    found: dict[int, dict[str, float]] = {}
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA:
            of_device = found.setdefault(event.device_index(), {})
            name = event.name()[:60]
            of_device[name] = of_device.get(name, 0.0) + event.duration_ns() / 1e3 / steps
    return found


def is_exchange(kernel: str) -> bool:
    return "nccl" in kernel.lower()


class Timed:
    """A layer of a case: its programs, compiled by threads beside those of other cases."""

    def __init__(self, case: Case, config: IndexerConfig, steps: int, pool: Any):
        self.case, self.config, self.steps = case, config, steps
        room = (REPEATS + 3) * 2 * steps
        self.room = room
        bare = shapes_of(case, config)
        mesh = case.mesh()

        def placed(tree, specs):
            return jax.tree.map(
                lambda x, spec: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
                ),
                tree,
                specs,
            )

        bare = placed(bare, case.of_cache(bare))
        make = jax.jit(cells_made(case, config), donate_argnums=0)
        cache = dataclasses.replace(bare, index=jax.eval_shape(make, bare.index))
        cache = placed(cache, case.of_cache(cache))
        B, N, K, _ = case.sizes
        of = lambda n: jax.ShapeDtypeStruct((B, 1, n, DIMENSIONS), jnp.bfloat16)  # noqa: E731
        query, new = (placed(of(n), case.of_query) for n in (N, K))
        run = jax.jit(decoding(case, config, steps, cache), donate_argnums=0).lower(
            cache, query, new
        )
        lists = jax.jit(listing(case, config, cache.index)).lower(cache.index, query)
        self._make = make.lower(bare.index)
        self._future = pool.submit(
            lambda: (
                self._make.compile(),
                lists.compile() if case.share == (1, 1, 1) else None,
                run.compile(),
                run.compile(NO_COMMAND_BUFFERS) if results.has_gpu() else None,
            )
        )

    def measure(self, lists: dict[tuple[int, int], np.ndarray]) -> dict[str, Any]:
        """Checks lists, then times; `lists` are those of one device, by rows and tokens."""
        make, select_, run, recorded = self._future.result()
        case, steps, found = self.case, self.steps, {}
        cache, query, new = drawn(case, self.config, self.room)
        cache = dataclasses.replace(cache, index=make(cache.index))
        key = case.rows, case.tokens
        if select_ is not None:
            together = np.asarray(select_(cache.index, query))
            if case.devices == 1:
                lists[key] = together
            else:
                if key not in lists:
                    lists[key] = lists_of_one(case, self.config, self.room)
                together = in_order(together, lists[key].shape[-1])
                np.testing.assert_array_equal(together, lists[key])
                found["checked"] = True
        memory = run.memory_analysis()
        found["bytes_a_device"] = int(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
        text = run.as_text()
        shape = ",".join(str(size) for size in cache.key.sharding.shard_shape(cache.key.shape))
        found["copies_of_caches"] = text.count(f"bf16[{shape}]{{3,2,1,0}} copy(")
        state = [cache]
        del cache  # which is given away

        def once(program):
            state[0], out = program(state[0], query, new)
            return out

        once(run)
        found["wall_us"] = 1e6 * best_of(lambda: once(run), REPEATS) / steps
        if recorded is not None:
            once(recorded)
            found["wall_us_without_graphs"] = 1e6 * best_of(lambda: once(recorded), 3) / steps
            by_device = kernels_by_device(lambda: once(recorded), steps)
            sums = [
                [sum(us for name, us in one.items() if is_exchange(name) == nccl)
                 for nccl in (False, True)]
                for one in by_device.values()
            ]  # fmt: skip
            found["kernel_us"], found["nccl_us"] = (float(x) for x in np.median(sums, axis=0))
            first = by_device[min(by_device)]
            found["by_kernel"] = dict(sorted(first.items(), key=lambda item: -item[1])[:12])
        assert int(np.max(np.asarray(state[0].index.lengths))) <= case.sizes[3]
        return found


def in_order(lists: np.ndarray, size: int) -> np.ndarray:
    """Positions of all devices as one device lists them."""
    last = np.iinfo(np.int32).max
    lists = np.sort(np.where(lists < 0, last, lists), axis=-1)[..., :size]
    return np.where(lists == last, -1, lists)


def time_training(cases: Sequence[Case], config: IndexerConfig) -> Iterator[dict[str, Any]]:
    """build_index of each case; codebooks beside those of one device."""
    first = None
    for case in cases:
        cache, _, _ = drawn(case, config, 64)
        key, lengths = cache.key, cache.index.lengths
        del cache
        run = jax.jit(training(case, config))
        codebooks, codes = jax.block_until_ready(run(key, lengths))
        row = {"wall_us": 1e6 * best_of(lambda: run(key, lengths), 3)}  # noqa: B023
        codebooks, codes = np.asarray(codebooks), np.asarray(codes)
        if first is None:
            first = codebooks, codes
        else:
            row["codebooks_differ_by"] = float(np.abs(codebooks - first[0]).max())
            row["codes_differ"] = float(np.mean(codes != first[1]))
        yield about(case, "build_index") | row


def about(case: Case, what: str) -> dict[str, Any]:
    """What a row is of."""
    B, N, K, S = case.sizes
    return {
        "what": what,
        "case": case.name,
        "devices": case.devices,
        "split": dict(zip(AXES, case.split, strict=True)),
        "rows": case.rows,
        "tokens": case.tokens,
        "sizes": {"B": B, "N": N, "K": K, "H": DIMENSIONS, "S": S},
    }


# The command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `devices`."""
    parser.add_argument(
        "--layer",
        nargs="+",
        metavar="BxL",
        default=["4x131072", "1x2097152"],
        help="rows and tokens of the layers; default: 4x131072 1x2097152",
    )
    parser.add_argument(
        "--split",
        nargs="+",
        choices=WAYS,
        default=WAYS,
        help="what is timed beside one device: 'both' is heads over two and tokens over the rest, "
        "'part' the work of one of several on one; default: all",
    )
    parser.add_argument("--build", metavar="BxL", nargs="*", default=["4x131072"],
                        help="of what build_index is timed for; default: 4x131072")  # fmt: skip


def sizes_in(word: str) -> tuple[int, int]:
    """Rows and tokens; ValueError for another word."""
    rows, _, tokens = word.partition("x")
    if not (rows.isdigit() and tokens.isdigit() and int(rows) * int(tokens)):
        raise ValueError(f"--layer: expected rows and tokens as in 4x131072, got {word}")
    return int(rows), int(tokens)


def plan(arguments: argparse.Namespace) -> Plan:
    """What a command line of `devices` asks for; ValueError if it cannot be."""
    config = IndexerConfig(cells=True)
    layers, built = (
        [sizes_in(word) for word in words] for words in (arguments.layer, arguments.build)
    )
    devices = jax.device_count()
    if devices < 2:
        raise ValueError("one device: this compares several with one")
    steps = QUICK_STEPS if arguments.quick else STEPS
    cases = [case for layer in layers for case in cases_of(*layer, devices, arguments.split)]
    rows: list[dict[str, Any]] = []

    def measured(plan: Plan) -> Iterator[None]:
        lists: dict[tuple[int, int], np.ndarray] = {}
        with compilers() as pool:
            start = time.perf_counter()
            timed = [Timed(case, config, steps, pool) for case in cases]
            say(f"traced {len(timed)} programs in {time.perf_counter() - start:.0f} s")
            for one in timed:
                row = about(one.case, "decode_attention")
                try:
                    row |= one.measure(lists) | {"status": "ok"}
                except Exception as error:  # the other cases are worth having
                    row |= {"status": "failed", "reason": str(error)[:500]}
                rows.append(row)
                say(f"{row['rows']}x{row['tokens']} {row['case']}: {shown(row)}")
                yield
        for layer in built:
            of_layer = [c for c in cases_of(*layer, devices) if c.share == (1, 1, 1)]
            chosen = [c for c in of_layer if c.devices == 1 or c.split == (1, 1, c.devices)]
            try:
                for row in time_training(chosen, config):
                    rows.append(row | {"status": "ok"})
                    say(f"build_index {row['rows']}x{row['tokens']} {row['case']}: {shown(row)}")
                    yield
            except Exception as error:
                plan.failed(f"build_index: {str(error)[:500]}")
        yield

    about_steps = {"steps": steps, "config": repr(config)}
    return Plan("devices", f"devices-{devices}", lambda: rows, measured, about_steps)


def shown(row: dict[str, Any]) -> str:
    """A row's numbers in a line."""
    if row.get("status") == "failed":
        return row["reason"]
    names = "wall_us", "wall_us_without_graphs", "kernel_us", "nccl_us"
    parts = [f"{name} {row[name]:.1f}" for name in names if name in row]
    parts += [f"{name} {row[name]}" for name in row if name in ("checked", "codes_differ")]
    return ", ".join(parts)


def draw(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """A decode step against devices: a panel for each layer, a line for each way to split it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    decoded = [row for row in rows if row["what"] == "decode_attention" and "wall_us" in row]
    decoded = [row for row in decoded if "1/" not in row["case"]]
    layers = sorted({(row["tokens"], row["rows"]) for row in decoded})
    counts = sorted({row["devices"] for row in decoded})
    across = 2 if len(layers) > 1 else 1
    shape = -(-len(layers) // across), across
    figure = Figure(figsize=(4 * across, 2.4 * shape[0] + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    for (tokens, number), ax in zip(layers, panels.flat, strict=False):
        of_layer = [row for row in decoded if (row["tokens"], row["rows"]) == (tokens, number)]
        for (ways, label), marker in zip(WAYS_DRAWN.items(), "osD^", strict=True):
            found = [
                row for row in of_layer if {k for k, n in row["split"].items() if n > 1} == ways
            ]
            if not found:
                continue
            points = [row for row in of_layer if row["devices"] == 1] + found
            points = sorted(
                (row["devices"], row["wall_us"], row.get("kernel_us")) for row in points
            )
            x, wall, kernels = zip(*points, strict=True)
            (line,) = ax.plot(x, wall, label=label, marker=marker)
            if None not in kernels:
                ax.plot(x, kernels, linestyle=":", marker=marker, color=line.get_color(), ms=3)
        ax.set_title(f"{number} row{'s' * (number > 1)} of {tokens} tokens", fontsize=9)
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.minorticks_off()
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    figure.supxlabel("devices")
    figure.supylabel("a step, µs: wall clock; dotted: kernels but NCCL's")
    lines = {x.get_label(): x for ax in panels.flat for x in ax.get_lines()}
    shown = [label for label in WAYS_DRAWN.values() if label in lines]
    figure.legend([lines[x] for x in shown], shown, loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


PICTURE = "time-against-devices.png"
