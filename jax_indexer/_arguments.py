"""Checks of arguments: static facts only (types, shapes, dtypes), before anything is compiled."""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_indexer.config import FLOAT_DTYPES, IndexerConfig
from jax_indexer.kernels import backend
from jax_indexer.layout import KVLayout

INT32 = (np.dtype(jnp.int32),)
BOOL = (np.dtype(bool),)
UINT8 = (np.dtype(jnp.uint8),)
FLOAT32 = (np.dtype(jnp.float32),)


class Sizes(dict[str, int]):
    """Sizes of axes by letter, what each was learnt from, and how keys were understood."""

    def __init__(self):
        self.source: dict[str, str] = {}
        self._understood: dict[str, str] = {}
        self._kv_layout = ""

    def learn(self, source: str, **sizes: int) -> None:
        """Adds sizes and remembers where they come from."""
        self.update(sizes)
        self.source |= dict.fromkeys(sizes, source)

    def understand(self, name: str, axes: Sequence[str], shape: Sequence[int], kv_layout: KVLayout):
        """Remembers what a key's shape means, which the layout decides."""
        seen = ", ".join(f"{axis}={size}" for axis, size in zip(axes, shape, strict=True))
        self._understood[name] = f"{name} understood as [{seen}]"
        (other,) = set(get_args(KVLayout)) - {kv_layout}
        swapped = " and ".join(axes[1:3])
        self._kv_layout = f'with kv_layout="{kv_layout}"; kv_layout="{other}" swaps {swapped}'

    def understood(self, *names: str) -> str:
        """The end of a message: what was understood of those of these arguments that are keys."""
        seen = [self._understood[n] for n in dict.fromkeys(names) if n in self._understood]
        return f"; {', '.join(seen)} {self._kv_layout}" if seen else ""


def check_array(
    name: str,
    value: Any,
    letters: str,
    sizes: Sizes,
    dtypes: Iterable[np.dtype],
    fixes: Mapping[str, str] = MappingProxyType({}),
    kv_layout: KVLayout | None = None,
) -> None:
    """Checks one array against the axes named in `letters`, and learns the sizes of new ones.

    Args:
      name: the argument's name, for the message.
      value: the argument.
      letters: axes separated by spaces, such as "B T N H".
      sizes: sizes known so far by letter; those of new letters are added.
      dtypes: what is accepted.
      fixes: what to do about a wrong size, by letter, or about a wrong number of axes, by
        `letters`, where there is more to say than to mend it.
      kv_layout: what the order of the letters follows from, if from that.

    Raises:
      ValueError: for anything but an array of that rank, shape and dtype.
    """
    dtypes = tuple(dtypes)
    axes = letters.split()
    wanted = "/".join(d.name for d in dtypes)
    wanted += "[" + ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes) + "]"
    full = f"jnp.full({sizes.get('B', 'B')}, {{}}, jnp.{dtypes[0].name})"  # one number for all rows
    if not isinstance(value, (jax.Array, np.ndarray)):
        make = f"make it an array with jnp.asarray(..., jnp.{dtypes[0].name})"
        if letters == "B" and isinstance(value, (numbers.Integral, np.bool_)):
            make = f"give each row its own with {full.format(value)}"
        raise ValueError(f"{name}: expected {wanted}, got {type(value).__name__}; {make}")
    shape, dtype = tuple(value.shape), value.dtype
    got = f"{getattr(dtype, 'name', dtype)}[{', '.join(map(str, shape))}]"
    if len(shape) != len(axes):
        fix = fixes.get(letters, f"reshape it to {len(axes)} axes ({letters})")
        if letters == "B" and not shape:
            fix = f"give each row its own with {full.format(name)}"
        raise ValueError(f"{name}: expected {wanted}, got {got}; {fix}")
    if dtype not in dtypes:
        raise ValueError(f"{name}: expected {wanted}, got {got}; {_cast(dtype, dtypes)}")
    if kv_layout is not None:
        sizes.understand(name, axes, shape, kv_layout)
    for axis, size in zip(axes, shape, strict=True):
        if size != sizes.get(axis, size):
            source = sizes.source[axis]
            fix = fixes.get(axis, f"axis {axis} must be {sizes[axis]}, as in {source}")
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
    check_choice("implementation", implementation, (None, *get_args(backend.Implementation)))
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
    name: str, key: Any, tokens: str, kv_layout: Any, sizes: Sizes, *, head: str = "H"
) -> None:
    """Checks a key or value array [B, tokens, K, head] in either layout."""
    check_choice("kv_layout", kv_layout, get_args(KVLayout))
    letters = f"B {tokens} K {head}" if kv_layout == "BSKH" else f"B K {tokens} {head}"
    check_array(name, key, letters, sizes, FLOAT_DTYPES, kv_layout=kv_layout)


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
        fix = "query is [B, T, N, H]"
        if sizes.understood(source) and kv_heads % heads == 0:
            fix = f"swap query and {source} if each is in the other's place"
        raise ValueError(
            f"query: expected a number of query heads N divisible by K={kv_heads} kv heads, "
            f"got N={heads}; {fix}{sizes.understood(source)}"
        )
