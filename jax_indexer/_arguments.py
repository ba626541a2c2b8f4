"""Checks of arguments: static facts only (types, shapes, dtypes), before anything is compiled."""

import functools
import numbers
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType

from jax_indexer.config import (
    FLOAT_DTYPES,
    Implementation,
    IndexerConfig,
    Selector,
    beyond_cells,
)
from jax_indexer.kernels import backend
from jax_indexer.layout import KVLayout, key_letters, power_of_2_from
from jax_indexer.memory import PINNED_HOST, is_on_host
from jax_indexer.recent import recent_size
from jax_indexer.state import (
    MOST_NEW,
    Cells,
    DecodeCache,
    PQIndex,
    Recent,
    Rest,
    Sealing,
    Selection,
    ValueSums,
)
from jax_indexer.values import sums_by

# The axis in front of all arrays of a state or a cache of several layers.
LAYERS = "layers"
NOT_STACKED = "leave layer= out for what has no axis of layers"
STACKED = "of several layers say which with layer=..."
STACKED_ALONE = "of several layers take one, or map over them with jax.vmap"
# How a cache in host memory is asked for.
IN_HOST_MEMORY = f'memory_kind="{PINNED_HOST}"'
# What to do about a cache in pages that is taken for one in rows.
PASS_TABLE = "pass page_table=..."
CHUNK_TAKES_NONE = "prefill takes it with page_table=..., prefill_chunk takes none"


class Expected(NamedTuple):
    """What an annotation says of an array."""

    axes: tuple[str, ...]
    dtypes: tuple[np.dtype, ...]
    is_optional: bool = False

    @property
    def letters(self) -> str:
        """The axes, separated by spaces."""
        return " ".join(self.axes)

    def of(self, sizes: "Sizes") -> "Expected":
        """What is expected of an array of the state, where it may have an axis of layers."""
        return self._replace(axes=(LAYERS, *self.axes)) if sizes.stacked else self


@functools.cache
def annotated_arrays(owner: Any) -> dict[str, Expected]:
    """The arrays of a state, or of a function's arguments, by name, read from their annotations."""
    found = {}
    for name, hint in get_type_hints(owner).items():
        kinds = [x for x in (hint, *get_args(hint)) if hasattr(x, "dim_str")]
        if kinds:
            names = kinds[0].dtypes  # of bool[] two for one dtype
            dtypes = FLOAT_DTYPES if "bfloat16" in names else (np.dtype(names[0]),)
            is_optional = type(None) in get_args(hint)
            found[name] = Expected(tuple(kinds[0].dim_str.split()), dtypes, is_optional)
    return found


# What several functions take. A test holds it to their annotations.
QUERY = Expected(("B", "T", "N", "H"), FLOAT_DTYPES)
NUMBERS = Expected(("B",), (np.dtype(jnp.int32),))
ROWS = Expected(("B",), (np.dtype(bool),))
PAGES = Expected(("B", "pages"), (np.dtype(jnp.int32),))


class Sizes(dict[str, int]):
    """Sizes of axes by letter, what each was learnt from, and how keys were understood.

    Attributes:
      source: by letter, the argument.
      stacked: whether states and caches have an axis of layers in front.
      if_in_pages: what to do about caches that are in pages after all; None where they cannot be.
    """

    def __init__(self, *, stacked: bool = False, if_in_pages: str | None = None):
        self.stacked = stacked
        self.if_in_pages = if_in_pages
        self._perhaps_in_pages: set[str] = set()
        self.source: dict[str, str] = {}
        self._understood: dict[str, tuple[str, str]] = {}

    def learn(self, source: str, **sizes: int) -> None:
        """Adds sizes and remembers where they come from."""
        self.update(sizes)
        self.source |= dict.fromkeys(sizes, source)

    def understand(
        self, name: str, axes: Sequence[str], shape: Sequence[int], kv_layout: KVLayout
    ) -> None:
        """Remembers what a key's shape means, which the layout decides."""
        seen = ", ".join(f"{axis}={size}" for axis, size in zip(axes, shape, strict=True))
        if self.if_in_pages and "S" in axes and is_power_of_2(shape[axes.index("S")]):
            self._perhaps_in_pages.add(name)
        axes = [axis for axis in axes if axis != LAYERS]
        (other,) = set(get_args(KVLayout)) - {kv_layout}
        swapped = " and ".join(axes[1:3])
        layout = f'with kv_layout="{kv_layout}"; kv_layout="{other}" swaps {swapped}'
        self._understood[name] = f"{name} understood as [{seen}]", layout

    def understood(self, *names: str) -> str:
        """The end of a message: what was understood of those of these arguments that are keys."""
        seen = [self._understood[n] for n in dict.fromkeys(names) if n in self._understood]
        return f"; {', '.join(text for text, _ in seen)} {seen[0][1]}" if seen else ""

    def in_pages(self, *names: str) -> str:
        """What else to do about wrong rows, of those of these arguments that may be in pages."""
        found = [name for name in names if name in self._perhaps_in_pages]
        return f"; if {found[0]} is in pages, {self.if_in_pages}" if found else ""


def check_array(
    name: str,
    value: Any,
    expected: Expected,
    sizes: Sizes,
    fixes: Mapping[str, str] = MappingProxyType({}),
    kv_layout: KVLayout | None = None,
    may_be_on_host: bool = False,
) -> None:
    """Checks one array against what is expected, and learns the sizes of axes that are new.

    Args:
      name: the argument's name, for the message.
      value: the argument.
      expected: its axes and dtypes.
      sizes: sizes known so far by letter; those of new letters are added.
      fixes: what to do about a wrong size, by letter, or about a wrong number of axes, by all
        letters, where there is more to say than to mend it.
      kv_layout: what the order of the letters follows from, if from that.
      may_be_on_host: whether it may lie in host memory.

    Raises:
      ValueError: for anything but an array of that rank, shape and dtype, in memory that is right.
    """
    axes, dtypes, letters = expected.axes, expected.dtypes, expected.letters
    wanted = "/".join(d.name for d in dtypes)
    wanted += "[" + ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes) + "]"

    def for_all_rows(number: Any) -> str:
        rows = sizes.get("B", "B")
        return f"give each row its own with jnp.full({rows}, {number}, jnp.{dtypes[0].name})"

    if not isinstance(value, (jax.Array, np.ndarray)):
        make = f"make it an array with jnp.asarray(..., jnp.{dtypes[0].name})"
        if isinstance(value, (DecodeCache, PQIndex, Selection)):
            make = "mind the order of the arguments"
        if letters == "B" and isinstance(value, (numbers.Integral, np.bool_)):
            make = for_all_rows(value)
        raise ValueError(f"{name}: expected {wanted}, got {type(value).__name__}; {make}")
    shape, dtype = tuple(value.shape), value.dtype
    got = f"{getattr(dtype, 'name', dtype)}[{', '.join(map(str, shape))}]"
    if len(shape) != len(axes):
        wanted_axes = "one axis" if len(axes) == 1 else f"{len(axes)} axes"
        fix = fixes.get(letters, f"reshape it to {wanted_axes} ({letters})")
        if axes[0] == LAYERS and len(shape) == len(axes) - 1:
            source = sizes.source.get(LAYERS)
            fix = f"it needs an axis of layers in front, as {source} has" if source else NOT_STACKED
        if letters == "B" and not shape:
            fix = for_all_rows(name)
        raise ValueError(f"{name}: expected {wanted}, got {got}; {fix}")
    if dtype not in dtypes:
        raise ValueError(f"{name}: expected {wanted}, got {got}; {_cast(dtype, dtypes)}")
    if is_on_host(value) and not may_be_on_host:
        raise ValueError(
            f"{name}: expected an array on the device, got one in {PINNED_HOST} memory; move it "
            "with jax.device_put(..., jax.memory.Space.Device)"
        )
    if kv_layout is not None:
        sizes.understand(name, axes, shape, kv_layout)
    for axis, size in zip(axes, shape, strict=True):
        if size != sizes.get(axis, size):
            source = sizes.source[axis]
            fix = fixes.get(axis, f"axis {axis} must be {sizes[axis]}, as in {source}")
            fix += sizes.in_pages(name, source) if axis == "B" else ""
            raise ValueError(
                f"{name}: expected {wanted}, got {got}; {fix}{sizes.understood(source, name)}"
            )
        if size == 0:
            raise ValueError(f"{name}: expected {wanted}, got {got}; axis {axis} must not be empty")
        if axis not in sizes:
            sizes.learn(name, **{axis: size})


def _cast(dtype: Any, dtypes: tuple[np.dtype, ...]) -> str:
    """What to do about a wrong dtype."""
    bfloat16 = np.dtype(jnp.bfloat16)
    if dtype == np.dtype("V2") and bfloat16 in dtypes:
        return "if NumPy saved it as bfloat16, restore that with .view(jnp.bfloat16)"
    if dtypes == (np.dtype(bool),) and jnp.issubdtype(dtype, jnp.integer):
        return "give a mask, True at what is meant, not numbers"
    if bfloat16 in dtypes and jnp.issubdtype(dtype, jnp.integer):
        return "cast with .astype(jnp.bfloat16), and multiply with the scales if it is quantized"
    is_small = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1
    wanted = bfloat16 if is_small and bfloat16 in dtypes else dtypes[0]
    return f"cast with .astype(jnp.{wanted.name})"


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    choices = tuple(choices)
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}; choose one of those")


def check_implementation(
    implementation: Any, *operands: Any, unsupported: str | None = None
) -> str | None:
    """Checks the name of an implementation, and that it can take these operands here.

    Args:
      implementation: the argument.
      *operands: arrays, or pytrees of them.
      unsupported: what else "triton" cannot do, if anything.

    Returns:
      What "triton" lacks here, or None.

    Raises:
      ValueError: for another name.
      NotImplementedError: for "triton" where it lacks something.
    """
    check_choice("implementation", implementation, (None, *get_args(Implementation)))
    missing = unsupported or backend.no_gpu() or backend.unaddressable(*jax.tree.leaves(operands))
    if missing and implementation == "triton":
        raise NotImplementedError(f'implementation: "triton" lacks support: {missing}; use None')
    return missing


def check_config(config: Any) -> None:
    """Raises ValueError unless `config` is an IndexerConfig."""
    if not isinstance(config, IndexerConfig):
        raise ValueError(
            f"config: expected an IndexerConfig, got {type(config).__name__}; "
            "build one with jax_indexer.IndexerConfig(...)"
        )


def check_key(
    name: str,
    key: Any,
    tokens: str,
    kv_layout: Any,
    sizes: Sizes,
    *,
    head: str = "H",
    stacked: str = STACKED,
    may_be_on_host: bool = False,
    page_table: Any = None,
) -> None:
    """Checks keys or values [B, tokens, K, head] in either layout; S tokens are a cache.

    `stacked` says what to do about a cache with an axis of layers that is not expected. With a page
    table a cache has pages and their slots instead of rows and tokens.
    """
    check_choice("kv_layout", kv_layout, get_args(KVLayout))
    expected = Expected(tuple(key_letters(kv_layout, tokens, head).split()), FLOAT_DTYPES)
    fixes = {}
    if page_table is not None:
        in_pages = {"B": "num_pages", tokens: "page_size"}
        axes = tuple(in_pages.get(axis, axis) for axis in expected.axes)
        expected = expected._replace(axes=axes).of(sizes)
    elif tokens == "S":
        fixes = {expected.letters: _unstacked(stacked, sizes)} if np.ndim(key) == 5 else {}
        expected = expected.of(sizes)
    check_array(name, key, expected, sizes, fixes, kv_layout, may_be_on_host)


def _unstacked(fix: str, sizes: Sizes) -> str:
    """What to do about an axis of layers that is not expected; a cache may have told so."""
    return f"take the layer that {sizes.source['S']} is of" if "S" in sizes else fix


def check_memory_kind(memory_kind: Any) -> None:
    """Checks where a cache is to lie, and that the default device has such memory."""
    check_choice("memory_kind", memory_kind, (None, PINNED_HOST))
    device, kinds = kinds_of_memory()
    if memory_kind is not None and memory_kind not in kinds:
        raise ValueError(
            f"memory_kind: expected a kind of memory that {device} has, "
            f"{', '.join(kinds)}, got {memory_kind!r}; use None"
        )


def kinds_of_memory() -> tuple[str, list[str]]:
    """What the default device is, and the kinds of memory that it has."""
    device = jax.devices()[0]
    return device.device_kind, [memory.kind for memory in device.addressable_memories()]


def check_same_memory(names: tuple[str, str], key: Any, value: Any) -> bool:
    """Checks that keys and values are in one memory; whether it is that of the host."""
    where = [f"in {PINNED_HOST} memory" if is_on_host(x) else "on the device" for x in (key, value)]
    if where[0] != where[1]:
        raise ValueError(
            f"{names[1]}: expected it to lie where {names[0]} does, {where[0]}, got it "
            f"{where[1]}; move one of them with jax.device_put"
        )
    return is_on_host(key)


def check_streamed(key: Any, value: Any, config: IndexerConfig) -> None:
    """Checks that keys that an index is trained on in host memory are a sample of them."""
    if value is not None:
        check_same_memory(("key", "value"), key, value)
    if is_on_host(key) and config.train_tokens is None:
        raise ValueError(
            "config.train_tokens: expected a number of keys to train on where they are in "
            f"{PINNED_HOST} memory, got None; use train_tokens=65536 or so"
        )


def check_recent(cache: DecodeCache, config: IndexerConfig, sizes: Sizes) -> None:
    """Checks that what is recent is there for caches in host memory, and for no others."""
    is_there = check_same_memory(("cache.key", "cache.value"), cache.key, cache.value)
    if not isinstance(cache.recent, Recent if is_there else type(None)):
        wanted, where = ("Recent", "in host memory") if is_there else ("None", "on the device")
        raise ValueError(
            f"cache.recent: expected {wanted} with keys {where}, got "
            f"{type(cache.recent).__name__}; make the cache with "
            f"empty_cache(..., memory_kind={PINNED_HOST!r})"
        )
    if cache.recent is None:
        return
    if cache.recent.key.dtype != cache.key.dtype or cache.recent.value.dtype != cache.value.dtype:
        raise ValueError(
            f"cache.recent: expected {cache.key.dtype.name} and {cache.value.dtype.name}, as the "
            f"cache has, got {cache.recent.key.dtype.name} and {cache.recent.value.dtype.name}; "
            "make the cache with empty_cache"
        )
    sizes.learn("config", R=recent_size(config))
    fix = (
        f"with sink_size={config.sink_size} and window_size={config.window_size} the config says "
        "otherwise; use the config that the cache was made with"
    )
    check_fields("cache.recent", cache.recent, sizes, {"R": fix})
    if cache.recent.sink_size != config.sink_size:
        raise ValueError(
            f"cache.recent.sink_size: expected {config.sink_size}, got {cache.recent.sink_size}; "
            f"{fix}"
        )


def pages_fix(key: Any, fix: str = PASS_TABLE) -> str | None:
    """What to do about a cache that is in pages after all; one in host memory cannot be."""
    return None if is_on_host(key) else fix


def is_power_of_2(number: int) -> bool:
    """Whether a size is one that pages may have."""
    return power_of_2_from(number) == number


def check_page_table(page_table: Any, sizes: Sizes) -> None:
    """Checks the table of caches in pages, which are checked already, and learns S from it."""
    if page_table is None:
        return
    check_array("page_table", page_table, PAGES, sizes)
    rows, size = sizes["B"], sizes["page_size"]
    if not is_power_of_2(size):
        in_rows = "; a cache in rows takes no page_table" if sizes.get("num_pages") == rows else ""
        raise ValueError(
            f"{sizes.source['page_size']}: expected a page_size that is a power of two, got "
            f"{size}; use 16 to 256{in_rows}"
        )
    most = sizes["pages"] * size
    if sizes.setdefault("S", most) > most:
        raise ValueError(
            f"page_table: expected pages for S={sizes['S']} tokens of a row, got {sizes['pages']} "
            f"of page_size={size}; make the table wider, with -1 for pages that are absent"
        )
    sizes.source.setdefault("S", "page_table")


def check_layer(layer: Any) -> Array | None:
    """The number of a layer as an int32 scalar on the device, or None; ValueError otherwise."""
    if layer is None:
        return None
    if isinstance(layer, (jax.Array, np.ndarray)):
        if not layer.ndim and layer.dtype == np.int32:
            return jax.device_put(layer)
    elif isinstance(layer, numbers.Integral) and not isinstance(layer, (bool, np.bool_)):
        return jax.device_put(np.clip(int(layer), -(2**31), 2**31 - 1).astype(np.int32))
    got = type(layer).__name__
    if isinstance(layer, (jax.Array, np.ndarray)):
        got = f"{layer.dtype.name}[{', '.join(map(str, layer.shape))}]"
    raise ValueError(
        f"layer: expected an int32 scalar, an int or None, got {got}; "
        "pass the number of one layer, jnp.int32(...) if it is traced"
    )


# What to do where a function takes no part of rows, for `check_sequence_axis`.
BUILT_APART = "make the cache as DecodeCache(key, value, build_index(..., sequence_axis=...))"


def check_sequence_axis(
    axis: Any,
    whole: Mapping[str, Any],
    parts: Mapping[str, Any],
    *,
    without: Mapping[str, Any],
    fix: str | None = None,
) -> int:
    """Checks over which axis of a mesh S is split, by what is whole there and what is a part.

    Under a `shard_map` with `check_vma=True` types say which arrays differ among the devices along
    an axis. With `check_vma=False` they say nothing, but an index may know for what S it was made.

    Args:
      axis: the name, or None where S is not split.
      whole: by name, what is the same on all devices that share a row; nothing where types alone
        do not say whether S is split.
      parts: by name, indexes and caches of which a device has its own positions; lengths of rows
        are whole.
      without: by the name of an option, what it needs that is not there where S is split.
      fix: what to do where S is split without saying so; None to say so.

    Returns:
      How many devices share a row.
    """
    mesh, devices = jax.sharding.get_abstract_mesh(), 1
    if axis is None:
        _check_not_split(whole, parts, mesh.shape, fix)
    else:
        devices = _devices_along(axis, mesh)
        indexes = {name: x for name, x in parts.items() if isinstance(x, PQIndex)}
        of_rows = {f"{name}.lengths": index.lengths for name, index in indexes.items()}
        for name, x in (*whole.items(), *of_rows.items()):
            if axis in _varying(x):
                raise ValueError(
                    f"{name}: expected the same on all devices along sequence_axis={axis!r}, got "
                    f"one that differs over it; leave {axis!r} out of its in_specs"
                )
        for name, missing in without.items():
            raise NotImplementedError(
                f"sequence_axis: {name} needs {missing}, which is not there yet; do without "
                f"{name.partition('=')[0]}, or split batch or heads"
            )
    for name, index in parts.items():
        if not isinstance(index, PQIndex) or index.capacity is None:
            continue
        size = index.codes.shape[-1]
        if index.capacity != size * devices:
            by_hand = "use dataclasses.replace(index, capacity=None) if it was cut or grown by hand"
            if axis is not None:
                advice = (
                    f"split S over {axis!r} and no other axis, make the index with "
                    f"sequence_axis={axis!r} too, or {by_hand}"
                )
            elif AxisType.Manual in mesh.axis_types:
                fix = fix or "pass sequence_axis=..."
                advice = f"{fix} if S is split over devices, or {by_hand}"
            else:
                advice = by_hand
            raise ValueError(
                f"{name}.codes: expected S={index.capacity}{f'/{devices}' if devices > 1 else ''} "
                f"tokens, as the index was made for, got S={size}; {advice}"
            )
    return devices


def _devices_along(axis: Any, mesh: Any) -> int:
    """How many devices there are along an axis of the shard_map around a call."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = [name for name, kind in kinds if kind == AxisType.Manual]
    if not isinstance(axis, str) or axis not in manual:
        fix = "use one of these" if manual else "call it inside a jax.shard_map over that axis"
        raise ValueError(
            "sequence_axis: expected None or an axis of the shard_map around the call, of which "
            f"there are {manual}, got {axis!r}; {fix}"
        )
    return mesh.shape[axis]


def _check_not_split(
    whole: Mapping[str, Any], parts: Mapping[str, Any], sizes: Mapping[str, int], fix: str | None
) -> None:
    """Checks by types that parts differ among devices along no other axes than all else does."""
    of_whole = frozenset().union(*map(_varying, whole.values()))
    for name, part in parts.items() if whole else ():
        is_index = isinstance(part, PQIndex)
        for other in sorted(_varying(part.codes if is_index else part) - of_whole):
            if sizes[other] > 1:
                raise ValueError(
                    f"{name}{'.codes' if is_index else ''}: expected arrays that differ over no "
                    f"other axes of the mesh than {' and '.join(whole)} may, got one that differs "
                    f"over {other!r}; {fix or f'pass sequence_axis={other!r}'} if its tokens are "
                    "split over that"
                )


def check_same_rows(lengths: Any, index: PQIndex) -> None:
    """Checks by types that new lengths are the same on all devices that share rows of an index."""
    sizes = jax.sharding.get_abstract_mesh().shape
    shared = _varying(index.codes) - _varying(index.lengths)
    for axis in sorted(shared & _varying(lengths)):
        if sizes[axis] > 1:
            raise ValueError(
                "lengths: expected the same on all devices that share rows, as index.lengths are, "
                f"got some that differ over {axis!r}; leave {axis!r} out of their in_specs"
            )


def sums_needed(config: IndexerConfig) -> dict[str, str]:
    """What `estimate_rest` needs where S is split, for `check_sequence_axis`."""
    if not config.estimate_rest:
        return {}
    return {f"estimate_rest={config.estimate_rest!r}": "sums of values over the axis"}


def _varying(tree: Any) -> frozenset[str]:
    """Axes of the mesh over which arrays differ, as far as types know."""
    return frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree))
    )


def check_subspaces(name: str, config: IndexerConfig, sizes: Sizes) -> None:
    """Checks that the head dimension learnt from argument `name` divides into subspaces."""
    if sizes["H"] % config.num_subspaces:
        raise ValueError(
            f"{name}: expected a head dimension H divisible by num_subspaces="
            f"{config.num_subspaces}, got H={sizes['H']}; choose num_subspaces among its divisors"
            f"{sizes.understood(name)}"
        )


def check_groups(sizes: Sizes) -> None:
    """Checks that the K kv heads divide the N query heads."""
    heads, kv_heads, source = sizes["N"], sizes["K"], sizes.source["K"]
    if heads % kv_heads:
        fix, tokens = "query is [B, T, N, H]", sizes.get("S", sizes.get("t", 1))
        if sizes.understood(source) and kv_heads % heads == 0:
            fix = f"swap query and {source} if each is in the other's place"
        if sizes.understood(source) and tokens > 1 and heads % tokens == 0:
            fix = f"mind the layout of {source}"
        raise ValueError(
            f"query: expected a number of query heads N divisible by K={kv_heads} kv heads, "
            f"got N={heads}; {fix}{sizes.understood(source)}"
        )


def check_fields(
    name: str, state: Any, sizes: Sizes, fixes: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Checks the arrays of a state by its annotations."""
    for field, expected in annotated_arrays(type(state)).items():
        value = getattr(state, field)
        if value is not None or not expected.is_optional:
            check_array(f"{name}.{field}", value, expected.of(sizes), sizes, fixes)


def check_index_type(index: Any, name: str = "index") -> None:
    """Raises ValueError unless `index` is a PQIndex."""
    if not isinstance(index, PQIndex):
        fix = "pass its index" if isinstance(index, DecodeCache) else "make one with build_index"
        raise ValueError(f"{name}: expected a PQIndex, got {type(index).__name__}; {fix}")


def check_index(index: Any, config: IndexerConfig, sizes: Sizes, name: str = "index") -> None:
    """Checks an index against the config and the head dimension H in `sizes`."""
    check_index_type(index, name)
    check_quantizer(index, config, sizes, name)
    check_values(index, config, sizes, name)
    cells = index.cells
    if (cells is not None) != config.cells:
        wanted, got, advice = None, type(cells).__name__, "dataclasses.replace(index, cells=None)"
        if config.cells:
            wanted, got, advice = "a state", None, "with_cells(index, config)"
        raise ValueError(
            f"{name}.cells: expected {wanted} with config.cells={config.cells}, got {got}; "
            f"use {advice}, or the config that the index was built with"
        )
    check_high_water(index, sizes, name)
    if cells is None:
        return
    sizes.learn("config", **{"C**M+1": config.num_cells + 1})
    check_cells(cells, sizes, name)
    made_for = {"first_candidate": config.first_candidate, "window_size": config.window_size}
    for field, wanted in made_for.items():
        if getattr(cells.sealing, field) != wanted:
            raise ValueError(
                f"{name}.cells.sealing.{field}: expected {wanted}, got "
                f"{getattr(cells.sealing, field)}; use the config that the index was built with, "
                "or with_cells(index, config)"
            )


def check_values(index: PQIndex, config: IndexerConfig, sizes: Sizes, name: str) -> None:
    """Checks the sums of values of an index, which are there if the config asks for them."""
    values = index.values
    wanted = ValueSums if config.estimate_rest else type(None)
    if not isinstance(values, wanted):
        raise ValueError(
            f"{name}.values: expected {'sums' if config.estimate_rest else None} with "
            f"config.estimate_rest={config.estimate_rest!r}, got "
            f"{None if values is None else type(values).__name__}; "
            "use the config that the index was built with"
        )
    if values is not None:
        sizes.learn("config", **dict(zip(("M'", "C'"), sums_by(config), strict=True)))
        fix = (
            f"with estimate_rest={config.estimate_rest!r} the config says otherwise; "
            "use the config that the index was built with"
        )
        check_fields(f"{name}.values", values, sizes, {"M'": fix, "C'": fix})


def check_high_water(index: PQIndex, sizes: Sizes, name: str = "index") -> None:
    """Checks the high water of an index, which is there if cells or sums follow it."""
    if index.high_water is not None:
        expected = annotated_arrays(PQIndex)["high_water"]
        check_array(f"{name}.high_water", index.high_water, expected.of(sizes), sizes)
    elif index.cells is not None or index.values is not None:
        raise ValueError(
            f"{name}.high_water: expected int32[B] with cells or sums of values, got None; keep "
            "that of the index that these are from, or make cells with with_cells(index, config)"
        )


def check_value(
    value: Any,
    config: IndexerConfig,
    kv_layout: Any,
    sizes: Sizes,
    *,
    stacked: str = STACKED,
    may_be_on_host: bool = False,
    page_table: Any = None,
) -> None:
    """Checks the cache of values, which is needed if sums of them are kept."""
    if config.estimate_rest and value is None:
        raise ValueError(
            "value: expected the cache of values with config.estimate_rest="
            f"{config.estimate_rest!r}, got None; pass value=..."
        )
    if not config.estimate_rest and value is not None:
        raise ValueError(
            f"value: expected None with config.estimate_rest=False, got {type(value).__name__}; "
            'leave it out, or use estimate_rest="codes" or "mean"'
        )
    if value is not None:
        where = {"may_be_on_host": may_be_on_host, "page_table": page_table}
        check_key("value", value, "S", kv_layout, sizes, head="H'", stacked=stacked, **where)


def check_cells(cells: Any, sizes: Sizes, name: str = "index") -> None:
    """Checks the state of the "cells" selector against the sizes that are known."""
    if not isinstance(cells, Cells) or not isinstance(cells.sealing, Sealing):
        kind = f" with {type(cells.sealing).__name__}" if isinstance(cells, Cells) else ""
        raise ValueError(
            f"{name}.cells: expected None, or Cells with a Sealing, "
            f"got {type(cells).__name__}{kind}; use with_cells(index, config)"
        )
    sizes.learn("PQIndex", **{"2": 2})
    sealing = cells.sealing
    sizes.learn(f"{name}.cells.sealing", segment=sealing.segment, ring=sealing.ring)
    check_fields(f"{name}.cells", cells, sizes)


def check_quantizer(
    index: PQIndex, config: IndexerConfig, sizes: Sizes, name: str = "index"
) -> None:
    """Checks the arrays of an index but its cells."""
    augmented = config.metric == "ip"
    dimensions = {"D'": sizes["H"] // config.num_subspaces + augmented}
    sizes.learn("config", M=config.num_subspaces, C=config.num_centroids, **dimensions)
    fix = (
        f"with num_subspaces={config.num_subspaces}, num_bits={config.num_bits}, "
        f"metric={config.metric!r} and H={sizes['H']} the config says otherwise; "
        "use the config that the index was built with"
    )
    fixes = {"M": fix, "C": fix, "D'": fix}
    if np.ndim(index.codebooks) == 6:
        fixes["B K M C D'"] = _unstacked(STACKED, sizes)
    check_fields(name, index, sizes, fixes)


def check_phi(index: PQIndex, config: IndexerConfig, name: str = "index") -> None:
    """Checks that what encodes by the inner-product metric has its norms."""
    if config.metric == "ip" and index.phi is None:
        raise ValueError(
            f'{name}.phi: expected float32[B, K, M] for metric="ip", got None; '
            "build the index with build_index, or pass phi=..."
        )


def check_seed(seed: Any) -> None:
    """Raises ValueError unless `seed` is a Python int of 32 bits."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(
            f"seed: expected an int in 0..2**32 - 1, got {seed!r}; "
            "pass a Python int, which cannot be traced"
        )


def check_with_cache(
    index: Any,
    key: Any,
    config: Any,
    kv_layout: Any,
    layer: Any,
    page_table: Any,
    *,
    may_be_on_host: bool = False,
) -> Sizes:
    """Checks an index and the cache it is of; returns the sizes of the axes."""
    check_config(config)
    sizes = Sizes(stacked=layer is not None, if_in_pages=pages_fix(key))
    options = {"may_be_on_host": may_be_on_host, "page_table": page_table}
    check_key("key", key, "S", kv_layout, sizes, **options)
    check_subspaces("key", config, sizes)
    check_index(index, config, sizes)
    check_page_table(page_table, sizes)
    check_phi(index, config)
    return sizes


def check_append(
    index: Any,
    key_new: Any,
    config: Any,
    value: Any,
    counts: Any,
    layer: Any,
    kv_layout: Any,
    implementation: Any,
    sequence_axis: Any,
) -> None:
    """Checks the arguments of `append`."""
    check_config(config)
    sizes = Sizes(stacked=layer is not None)
    check_key("key_new", key_new, "t", kv_layout, sizes)
    check_subspaces("key_new", config, sizes)
    check_index(index, config, sizes)
    whole = {"key_new": key_new, "counts": counts}
    without = sums_needed(config)
    devices = check_sequence_axis(sequence_axis, whole, {"index": index}, without=without)
    check_counts(counts, "key_new", "t", sizes, devices)
    check_phi(index, config)
    check_value(value, config, kv_layout, sizes)
    check_implementation(implementation, key_new, index)


def check_counts(counts: Any, name: str, tokens: str, sizes: Sizes, devices: int) -> None:
    """Checks how many of the `tokens` of the keys `name` rows take, all where it is not said."""
    capacity = sizes["S"] * devices
    if counts is not None:
        check_array("counts", counts, NUMBERS, sizes)
    elif sizes[tokens] > capacity:
        raise ValueError(
            f"{name}: expected at most {tokens}=S={capacity} tokens, as many as a row can hold, "
            f"got {tokens}={sizes[tokens]}; pass fewer, or counts{sizes.understood(name)}"
        )


def check_select(
    query: Any,
    index: Any,
    config: Any,
    counts: Any,
    layer: Any,
    return_weights: Any,
    implementation: Any,
    selector: Any,
    sequence_axis: Any,
) -> None:
    """Checks the arguments of `select`."""
    check_config(config)
    sizes = Sizes(stacked=layer is not None)
    check_array("query", query, QUERY, sizes)
    check_subspaces("query", config, sizes)
    check_index(index, config, sizes)
    check_groups(sizes)
    if counts is not None:
        check_array("counts", counts, NUMBERS, sizes)
    check_choice("return_weights", return_weights, (True, False))
    whole = {"query": query, "counts": counts}
    check_sequence_axis(sequence_axis, whole, {"index": index}, without=sums_needed(config))
    check_selector(selector, config, sizes["T"], implementation, query, index)


def check_selector(
    selector: Any, config: IndexerConfig, num_query_tokens: int, implementation: Any, *operands: Any
) -> None:
    """Checks the names of a selector and of an implementation, and that they take this here."""
    check_choice("selector", selector, (None, *get_args(Selector)))
    if selector == "cells" and not config.cells:
        raise ValueError(
            'selector: expected another than "cells" with config.cells=False, got "cells"; '
            "build the index with cells=True, or use None"
        )
    if selector == "cells" and (reason := beyond_cells(config, num_query_tokens)):
        raise NotImplementedError(f'selector: "cells" takes {reason}; use None')
    if selector in ("cells", "threshold") and implementation == "xla":
        raise NotImplementedError('selector: "xla" has "top_k" only; use None')
    missing = check_implementation(implementation, *operands)
    if missing and selector in ("cells", "threshold"):
        raise NotImplementedError(f'selector: "{selector}" needs "triton", and {missing}; use None')


def check_step(query: Any, key_new: Any, kv_layout: Any, fix: str) -> None:
    """Checks that queries and new keys are of the same step; `fix` is for where they are not."""
    sizes = Sizes()
    check_array("query", query, QUERY, sizes)
    check_key("key_new", key_new, "t", kv_layout, sizes)
    check_groups(sizes)
    if sizes["t"] != sizes["T"]:
        raise ValueError(
            f"key_new: expected t=T={sizes['T']} tokens, as many as query has, got t={sizes['t']}; "
            f"{fix}{sizes.understood('key_new')}"
        )


def check_is_selection(selection: Any) -> None:
    """Checks that lists are a Selection."""
    if not isinstance(selection, Selection):
        raise ValueError(
            f"selection: expected a Selection, got {type(selection).__name__}; "
            "pass what select returned"
        )


def check_selection(
    selection: Any, config: Any, sizes: Sizes, page_table: Any, sequence_axis: Any
) -> None:
    """Checks that `selection` is one, of an index of the cache's capacity, and by `config`."""
    check_is_selection(selection)
    if (axis := selection.sequence_axis) not in (None, sequence_axis):
        raise ValueError(
            f"sequence_axis: expected {axis!r}, over which the devices that made the selection "
            f"share its rows, got {sequence_axis!r}; pass sequence_axis={axis!r}"
        )
    if page_table is not None:  # pages may be more than a row takes
        if (selection.capacity or 0) > sizes["S"]:
            raise ValueError(
                f"page_table: expected pages for S={selection.capacity} tokens of a row, as the "
                f"index that selected has, got {sizes['pages']} of page_size={sizes['page_size']}; "
                "make the table wider, with -1 for pages that are absent"
            )
    elif selection.capacity not in (None, sizes["S"]):
        raise ValueError(
            f"key: expected S={selection.capacity} tokens, as the index that selected has, got "
            f"S={sizes['S']}; pass the whole cache{sizes.understood('key')}"
        )
    lists = annotated_arrays(Selection)["indices"]
    check_array("selection.indices", selection.indices, lists, sizes)
    if config is None:
        return
    check_config(config)
    if sizes["P"] != (size := config.max_selected(sizes["T"])):
        raise ValueError(
            f"selection: expected lists of P={size} entries, as select makes them with this "
            f"config, got P={sizes['P']}; pass the config that was given to select, or None"
        )


def check_return_rest(
    return_rest: Any, config: IndexerConfig, scale: Any, logits_soft_cap: Any
) -> None:
    """Checks that a rest is asked for where one can be made, and logits with it alone."""
    check_choice("return_rest", return_rest, (True, False))
    if return_rest and not config.estimate_rest:
        raise ValueError(
            "return_rest: expected False with config.estimate_rest=False, got True; build the "
            'index with estimate_rest="codes" or "mean"'
        )
    for name, given in (("scale", scale), ("logits_soft_cap", logits_soft_cap)):
        if given is not None and not return_rest:
            raise ValueError(
                f"{name}: expected None without return_rest, got {given!r}; scores need none, pass "
                "it to sparse_attention"
            )


def check_rest(rest: Any, config: Any, sizes: Sizes) -> None:
    """Checks that `rest` is that of a selection by `config`."""
    if rest is None:
        return
    if not isinstance(rest, Rest):
        raise ValueError(
            f"rest: expected a Rest, got {type(rest).__name__}; pass selection.rest, which select "
            "makes with return_rest=True"
        )
    if config is None:
        raise ValueError(
            "config: expected an IndexerConfig with a rest, got None; pass the config that was "
            "given to select, which says which tokens of a list are heavy"
        )
    for field, expected in annotated_arrays(Rest).items():
        check_array(f"rest.{field}", getattr(rest, field), expected, sizes)


def check_decode(
    query: Any,
    key_new: Any,
    value_new: Any,
    cache: Any,
    config: Any,
    counts: Any,
    layer: Any,
    kv_layout: Any,
    implementation: Any,
    selector: Any,
    sequence_axis: Any,
    page_table: Any,
) -> None:
    """Checks the arguments of `decode_attention`."""
    check_config(config)
    check_step(query, key_new, kv_layout, "a step brings the key of each query token")
    sizes = Sizes()
    check_array("query", query, QUERY, sizes)
    check_subspaces("query", config, sizes)
    check_key("key_new", key_new, "T", kv_layout, sizes)
    check_key("value_new", value_new, "T", kv_layout, sizes, head="H'")
    check_cache(cache, config, sizes, kv_layout, layer, page_table)
    check_whole_pages(page_table, sequence_axis, cache.key)
    check_dtypes({"key_new": key_new, "value_new": value_new}, cache)
    whole = {"query": query, "key_new": key_new, "value_new": value_new, "counts": counts}
    parts = {
        "cache.key": cache.key,
        "cache.value": cache.value,
        "cache.index": cache.index,
    }
    without = sums_needed(config)
    if config.rerank > 1:
        without |= {f"rerank={config.rerank}": "an exchange of true logits"}
    if cache.recent is not None:
        without |= {IN_HOST_MEMORY: "what is recent of a device's own positions"}
    devices = check_sequence_axis(sequence_axis, whole, parts, without=without)
    check_counts(counts, "key_new", "T", sizes, devices)
    if cache.recent is not None and sizes["T"] > MOST_NEW:
        raise NotImplementedError(
            f"key_new: caches in host memory take up to {MOST_NEW} tokens a step, got "
            f"T={sizes['T']}; use prefill or prefill_chunk for more"
        )
    check_selector(selector, config.pool, sizes["T"], implementation, query, cache)


def check_prompts(key: Any, value: Any, config: Any, kv_layout: Any) -> Sizes:
    """Checks keys and values of prompts, whole or a chunk of them; returns sizes."""
    check_config(config)
    sizes = Sizes()
    check_key("key", key, "s", kv_layout, sizes)
    check_subspaces("key", config, sizes)
    check_key("value", value, "s", kv_layout, sizes, head="H'")
    return sizes


def check_prefill(
    key: Any,
    value: Any,
    lengths: Any,
    config: Any,
    cache: Any,
    rows: Any,
    layer: Any,
    kv_layout: Any,
    page_table: Any,
) -> Sizes:
    """Checks prompts, and that they fit into the cache that they go into; returns sizes."""
    sizes = check_prompts(key, value, config, kv_layout)
    check_array("lengths", lengths, NUMBERS, sizes)
    if cache is None:
        for name, given in (("rows", rows), ("layer", layer), ("page_table", page_table)):
            if given is not None:
                raise ValueError(
                    f"{name}: expected None without a cache, got {type(given).__name__}; "
                    "pass cache=..., which empty_cache makes"
                )
        return sizes
    if rows is not None:
        check_array("rows", rows, ROWS, sizes)
    check_cache(cache, config, sizes, kv_layout, layer, page_table)
    # Types say nothing here: devices that share no row may have one prompt.
    check_sequence_axis(None, {}, {"cache.index": cache.index}, without={}, fix=BUILT_APART)
    check_whole_pages(page_table, None, cache.key)
    check_streamed(cache.key, None, config)
    check_dtypes({"key": key, "value": value}, cache)
    if sizes["s"] > sizes["S"]:
        raise ValueError(
            f"key: expected at most s=S={sizes['S']} tokens, as many as a row can hold, got "
            f"s={sizes['s']}; make a larger cache{sizes.understood('key')}"
        )
    return sizes


def check_chunk(
    key: Any,
    value: Any,
    start: Any,
    cache: Any,
    config: Any,
    counts: Any,
    layer: Any,
    kv_layout: Any,
    implementation: Any,
) -> None:
    """Checks a chunk of prompts, and the cache that it goes into."""
    sizes = check_prompts(key, value, config, kv_layout)
    check_array("start", start, NUMBERS, sizes)
    check_cache(cache, config, sizes, kv_layout, layer, None, in_pages=CHUNK_TAKES_NONE)
    check_counts(counts, "key", "s", sizes, 1)
    check_dtypes({"key": key, "value": value}, cache)
    whole = {"key": key, "value": value, "start": start, "counts": counts}
    parts = {
        "cache.key": cache.key,
        "cache.value": cache.value,
        "cache.index": cache.index,
    }
    check_sequence_axis(None, whole, parts, without={}, fix=BUILT_APART)
    check_implementation(implementation, key, cache)


def check_whole_pages(page_table: Any, sequence_axis: Any, key: Any) -> None:
    """Refuses pages of rows that several devices share, and pages in host memory."""
    if page_table is None:
        return
    if sequence_axis is not None:
        raise NotImplementedError(
            "page_table: with sequence_axis each device needs pages of its own positions, which is "
            "not there yet; leave one of them out"
        )
    if is_on_host(key):
        raise NotImplementedError(
            f"page_table: with caches in {PINNED_HOST} memory kernels need to write and keep rows "
            "by their pages, which is not there yet; leave one of them out"
        )


def check_cache(
    cache: Any,
    config: IndexerConfig,
    sizes: Sizes,
    kv_layout: Any,
    layer: Any,
    page_table: Any,
    *,
    in_pages: str = PASS_TABLE,
) -> None:
    """Checks the arrays of a cache against each other and the config; `in_pages` is a fix."""
    if not isinstance(cache, DecodeCache):
        raise ValueError(
            f"cache: expected a DecodeCache, got {type(cache).__name__}; "
            "make one with empty_cache or prefill"
        )
    sizes.stacked, sizes.if_in_pages = layer is not None, pages_fix(cache.key, in_pages)
    options = {"may_be_on_host": True, "page_table": page_table}
    check_key("cache.key", cache.key, "S", kv_layout, sizes, **options)
    check_key("cache.value", cache.value, "S", kv_layout, sizes, head="H'", **options)
    check_index(cache.index, config, sizes, "cache.index")
    check_page_table(page_table, sizes)
    check_phi(cache.index, config, "cache.index")
    check_recent(cache, config, sizes)


def check_dtypes(new: Mapping[str, Any], cache: DecodeCache) -> None:
    """Checks that keys and values that go into a cache have its dtypes."""
    for (name, x), old in zip(new.items(), (cache.key, cache.value), strict=True):
        if x.dtype != old.dtype:
            raise ValueError(
                f"{name}: expected {old.dtype.name}, as the cache has, got {x.dtype.name}; "
                f"cast with .astype(jnp.{old.dtype.name})"
            )


def check_sizes(**given: Any) -> dict[str, int]:
    """Checks that sizes are positive integers, and returns them as such."""
    found = {}
    for name, size in given.items():
        is_number = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
        if not is_number or not 1 <= size < 2**31:
            raise ValueError(
                f"{name}: expected an integer of at least 1, in 31 bits, got {size!r}; "
                "pass a Python int, since it is static"
            )
        found[name] = int(size)
    return found
