"""Rope: how keys were turned by their positions, and copies of them turned further on."""

import dataclasses
import math
import numbers
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int32

Pairs = Literal["interleaved", "half"]

# Of each key, unless asked for otherwise. More help where more is decoded than there is.
COPIES = 2
MOST_COPIES = 8
# 2**32 over the golden ratio: multiples of it, modulo 2**32, are spread evenly.
GOLDEN = 2654435769


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of keys: pairs of dimensions, turned in proportion to the position.

    Attributes:
      frequencies: of each pair, in radians a position, those of a scaled embedding as they are
        scaled. There may be fewer pairs than a head has room for: dimensions behind them do not
        turn.
      pairs: which dimensions are a pair, of R = 2 * len(frequencies): "half" for (i, i + R / 2),
        as most models have them, or "interleaved" for (2 i, 2 i + 1).

    Raises:
      ValueError: for frequencies that are not finite numbers, and for other pairs.

    Source: RoFormer (Su et al., 2021).
    """

    frequencies: tuple[float, ...]
    pairs: Pairs = "half"

    def __post_init__(self):
        try:
            given = np.asarray(self.frequencies)
        except Exception:  # jax refuses what it only traces in a way of its own
            given = np.zeros(0)
        if given.ndim != 1 or given.dtype.kind not in "iuf" or not len(given):
            given = np.asarray([np.nan])
        if not np.isfinite(given.astype(np.float64)).all():
            raise ValueError(
                f"frequencies: expected finite numbers, radians a position for each pair, got "
                f"{self.frequencies!r}; pass a tuple of floats, known outside of jit"
            )
        if not isinstance(self.pairs, str) or self.pairs not in get_args(Pairs):
            raise ValueError(
                f"pairs: expected one of {get_args(Pairs)}, got {self.pairs!r}; "
                'use "half" for dimensions i and i + R / 2'
            )
        object.__setattr__(self, "frequencies", tuple(map(float, given)))

    @classmethod
    def from_base(cls, base: float, head_dim: int, pairs: Pairs = "half") -> "Rope":
        """The frequencies base**(-2 i / head_dim), for all dimensions of a head.

        Raises:
          ValueError: for a base that is no positive number, and an odd head dimension.
        """
        if not isinstance(base, numbers.Real) or not 0 < base < math.inf:
            raise ValueError(f"base: expected a positive number, got {base!r}; as in 10000.0")
        if not isinstance(head_dim, (int, np.integer)) or head_dim < 2 or head_dim % 2:
            raise ValueError(
                f"head_dim: expected an even number of dimensions, got {head_dim!r}; pass those "
                "that turn"
            )
        return cls(tuple(base ** (-np.arange(0, head_dim, 2) / head_dim)), pairs)

    @property
    def dimensions(self) -> int:
        """R, the dimensions that turn."""
        return 2 * len(self.frequencies)

    def partner(self, h: Any) -> Any:
        """The dimension that makes a pair with each of these, itself for one that does not turn."""
        half = self.dimensions // 2
        other = h ^ 1 if self.pairs == "interleaved" else (h + half) % self.dimensions
        return (jnp if isinstance(h, Array) else np).where(h < self.dimensions, other, h)

    def pair(self, h: np.ndarray) -> np.ndarray:
        """The number of the pair that each of these dimensions is in."""
        return h // 2 if self.pairs == "interleaved" else h % (self.dimensions // 2)

    def is_first(self, h: np.ndarray) -> np.ndarray:
        """Which of these dimensions come first in their pair."""
        return h % 2 == 0 if self.pairs == "interleaved" else h < self.dimensions // 2


@dataclasses.dataclass(frozen=True)
class LookAhead:
    """What codebooks are trained on beside keys: copies, as if these came later.

    Attributes:
      rope: how the keys were turned.
      horizon: tokens that are expected behind the last of a row.
      copies: of each key.
      begin: where the keys that are trained on begin in the array that holds them.
    """

    rope: Rope
    horizon: int
    copies: int
    begin: int = 0

    def speed(self, head_dim: int) -> np.ndarray:
        """int32[H], how far each dimension turns in a position, in parts of 2**32 to a full turn.

        Multiples of it wrap around as turns do, so that no position is too far for float32.
        """
        h = np.arange(head_dim)
        turning = h < self.rope.dimensions
        frequency = np.asarray(self.rope.frequencies)[np.where(turning, self.rope.pair(h), 0)]
        parts = np.rint(np.mod(frequency / (2 * np.pi), 1) * 2**32).astype(np.uint64) % 2**32
        return np.where(turning, parts, 0).astype(np.uint32).view(np.int32)


def positions_on(
    i: Int32[Array, "*n"],
    distance: Int32[Array, "*#n"],
    stride: Int32[Array, "*#n"],
    copy: int | Int32[Array, ""],
    ahead: LookAhead,
) -> Int32[Array, "*n"]:
    """By how many positions a copy of a key is turned on: to one of those expected.

    These are spread evenly over the horizon, for neighbouring keys and for the copies of a key.

    Args:
      i: where the key lies in the array of keys.
      distance: from the first key that is trained on to the first position that is expected.
      stride: positions between two keys in the array.
      copy: its number.
      ahead: the horizon.
    """
    place = i - ahead.begin
    # In int32, whose products wrap around.
    golden, between = (np.uint32(x).view(np.int32) for x in (GOLDEN, (2**32 - 1) // ahead.copies))
    spread = place * golden + jnp.int32(copy) * between
    share = lax.shift_right_logical(spread, jnp.full_like(spread, 8)).astype(jnp.float32)
    further = (share * np.float32(ahead.horizon * 2.0**-24)).astype(jnp.int32)
    return distance - place * stride + further


def angles(
    on: Int32[Array, "*tokens #H"], speed: Int32[Array, "*#tokens H"]
) -> Float[Array, "*tokens H"]:
    """By which dimensions turn in so many positions, in [-pi, pi)."""
    return (on * speed).astype(jnp.float32) * np.float32(2 * np.pi / 2**32)


def turned(
    key: Float[Array, "*tokens H"], on: Int32[Array, "*#tokens"], ahead: LookAhead
) -> Float[Array, "*tokens H"]:
    """Keys turned on, in float32, rounded to their dtype as keys that come later would be."""
    h = np.arange(key.shape[-1])
    last = (1,) * on.ndim + (-1,)
    angle = angles(on[..., None], jnp.asarray(ahead.speed(len(h))).reshape(last))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    sin *= np.where(ahead.rope.is_first(h), np.float32(-1), np.float32(1)).reshape(last)
    own = key.astype(jnp.float32)
    both = own * cos + own[..., ahead.rope.partner(h)] * sin
    return both.astype(key.dtype).astype(jnp.float32)


def most_squared(key: Float[Array, "*tokens H"], ahead: LookAhead) -> Float[Array, "*tokens H"]:
    """Squares of keys and of the partners of their dimensions: a turned key has no larger sums."""
    key = key.astype(jnp.float32)
    partner = key[..., ahead.rope.partner(np.arange(key.shape[-1]))]
    return key * key + partner * partner


def check_look_ahead(rope: Any, look_ahead: Any, copies: Any, head_dim: int) -> LookAhead | None:
    """The arguments of this name; ValueError for what they cannot be."""
    copies = _number("copies", copies, MOST_COPIES, "how many copies of each key to train on")
    if rope is None and look_ahead is None:
        return None
    if not isinstance(rope, Rope):
        raise ValueError(
            f"rope: expected a Rope, got {type(rope).__name__}; say how keys were turned, or leave "
            "out look_ahead"
        )
    if rope.dimensions > head_dim:
        raise ValueError(
            f"rope: expected at most H/2={head_dim // 2} pairs, got {len(rope.frequencies)}; pass "
            "the frequencies of one head"
        )
    fix = "how many tokens are expected to be decoded"
    return LookAhead(rope, _number("look_ahead", look_ahead, 2**31 - 1, fix), copies)


def _number(name: str, value: Any, most: int, fix: str) -> int:
    """An integer from 1 on; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}: expected an integer, got {value!r}; pass {fix}")
    if not 1 <= value <= most:
        raise ValueError(f"{name}: expected 1 to {most}, got {value}; pass {fix}")
    return int(value)
