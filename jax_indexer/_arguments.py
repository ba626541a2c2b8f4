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


def check_array(
    name: str,
    value: Any,
    letters: str,
    sizes: dict[str, int],
    dtypes: Iterable[np.dtype],
    fixes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Checks one array against the axes named in `letters`, and learns the sizes of new ones.

    Args:
      name: the argument's name, for the message.
      value: the argument.
      letters: axes separated by spaces, such as "B T N H".
      sizes: sizes known so far by letter; those of new letters are added.
      dtypes: what is accepted.
      fixes: what to do about a wrong size, by letter, where there is more to say than to mend it.

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
        raise ValueError(
            f"{name}: expected {wanted}, got {got}; reshape it to {len(axes)} axes ({letters})"
        )
    if dtype not in dtypes:
        raise ValueError(
            f"{name}: expected {wanted}, got {got}; cast with .astype(jnp.{dtypes[0].name})"
        )
    for axis, size in zip(axes, shape, strict=True):
        if size != sizes.get(axis, size):
            raise ValueError(
                f"{name}: expected {wanted}, got {got}; "
                f"{fixes.get(axis, f'axis {axis} must be {sizes[axis]}, as in other arguments')}"
            )
        if size == 0:
            raise ValueError(f"{name}: expected {wanted}, got {got}; axis {axis} must not be empty")
        sizes[axis] = size


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


def check_key(name: str, key: Any, tokens: str, kv_layout: Any, sizes: dict[str, int]) -> None:
    """Checks a key or value array [B, tokens, K, H] in either layout."""
    check_choice("kv_layout", kv_layout, get_args(KVLayout))
    letters = f"B {tokens} K H" if kv_layout == "BSKH" else f"B K {tokens} H"
    check_array(name, key, letters, sizes, FLOAT_DTYPES)


def check_subspaces(name: str, config: IndexerConfig, sizes: dict[str, int]) -> None:
    """Checks that the head dimension learnt from argument `name` divides into subspaces."""
    if sizes["H"] % config.num_subspaces:
        raise ValueError(
            f"{name}: expected a head dimension H divisible by num_subspaces="
            f"{config.num_subspaces}, got H={sizes['H']}; choose num_subspaces among its divisors"
        )


def check_groups(sizes: dict[str, int]) -> None:
    """Checks that the K kv heads divide the N query heads."""
    if sizes["N"] % sizes["K"]:
        raise ValueError(
            f"query: expected a number of query heads N divisible by K={sizes['K']} kv heads, "
            f"got N={sizes['N']}; query is [B, T, N, H]"
        )
