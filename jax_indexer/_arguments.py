"""Checks of arguments: static facts only (types, shapes, dtypes), before anything is compiled."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jax_indexer.config import FLOAT_DTYPES, IndexerConfig
from jax_indexer.layout import KVLayout

INT32 = (np.dtype(jnp.int32),)
BOOL = (np.dtype(bool),)
UINT8 = (np.dtype(jnp.uint8),)
FLOAT32 = (np.dtype(jnp.float32),)


class Sizes(dict[str, int]):
    """Sizes of axes by letter, and what each was learnt from."""

    def __init__(self):
        self.source: dict[str, str] = {}

    def learn(self, source: str, **sizes: int) -> None:
        """Adds sizes and remembers where they come from."""
        self.update(sizes)
        self.source |= dict.fromkeys(sizes, source)


def check_array(
    name: str,
    value: Any,
    letters: str,
    sizes: Sizes,
    dtypes: Iterable[np.dtype],
    fixes: Mapping[str, str] = MappingProxyType({}),
    source: str | None = None,
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
      source: what other messages call this argument, if not by its name.

    Raises:
      ValueError: for anything but an array of that rank, shape and dtype.
    """
    dtypes = tuple(dtypes)
    axes = letters.split()
    wanted = "/".join(d.name for d in dtypes)
    wanted += "[" + ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes) + "]"
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise ValueError(
            f"{name}: expected {wanted}, got {type(value).__name__}; "
            f"make it an array with jnp.asarray(..., jnp.{dtypes[0].name})"
        )
    shape, dtype = tuple(value.shape), value.dtype
    got = f"{getattr(dtype, 'name', dtype)}[{', '.join(map(str, shape))}]"
    if len(shape) != len(axes):
        fix = fixes.get(letters, f"reshape it to {len(axes)} axes ({letters})")
        raise ValueError(f"{name}: expected {wanted}, got {got}; {fix}")
    if dtype not in dtypes:
        cast = f"cast with .astype(jnp.{dtypes[0].name})"
        if dtype == np.dtype("V2") and np.dtype(jnp.bfloat16) in dtypes:
            cast = "if NumPy saved it as bfloat16, restore that with .view(jnp.bfloat16)"
        raise ValueError(f"{name}: expected {wanted}, got {got}; {cast}")
    for axis, size in zip(axes, shape, strict=True):
        if size != sizes.get(axis, size):
            fix = fixes.get(axis, f"axis {axis} must be {sizes[axis]}, as in {sizes.source[axis]}")
            raise ValueError(f"{name}: expected {wanted}, got {got}; {fix}")
        if size == 0:
            raise ValueError(f"{name}: expected {wanted}, got {got}; axis {axis} must not be empty")
        if axis not in sizes:
            sizes.learn(source or name, **{axis: size})


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    choices = tuple(choices)
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}; choose one of those")


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
    check_array(
        name, key, letters, sizes, FLOAT_DTYPES, source=f"{name} with kv_layout={kv_layout!r}"
    )


def check_subspaces(name: str, config: IndexerConfig, sizes: Sizes) -> None:
    """Checks that the head dimension learnt from argument `name` divides into subspaces."""
    if sizes["H"] % config.num_subspaces:
        raise ValueError(
            f"{name}: expected a head dimension H divisible by num_subspaces="
            f"{config.num_subspaces}, got H={sizes['H']}; choose num_subspaces among its divisors"
        )


def check_groups(sizes: Sizes) -> None:
    """Checks that the K kv heads divide the N query heads."""
    if sizes["N"] % sizes["K"]:
        raise ValueError(
            f"query: expected a number of query heads N divisible by K={sizes['K']} kv heads, "
            f"got N={sizes['N']}; query is [B, T, N, H]"
        )
