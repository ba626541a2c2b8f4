"""Rope: how keys were turned by their positions, and copies of them turned further on."""

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int32

Pairs = Literal["interleaved", "half"]

# Of each key, unless asked for otherwise.
COPIES = 3
# Different turns that copies are given, evenly over the horizon. A power of two.
TURNS = 64
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
      ValueError: for frequencies or pairs that are none.

    Source: RoFormer (Su et al., 2021).
    """

    frequencies: tuple[float, ...]
    pairs: Pairs = "half"

    def __post_init__(self):
        wrong = None
        try:
            found = tuple(float(x) for x in np.asarray(self.frequencies, np.float64).reshape(-1))
            wrong = not found or not all(map(math.isfinite, found))
        except (TypeError, ValueError):
            found, wrong = (), True
        if wrong:
            raise ValueError(
                f"frequencies: expected finite numbers, radians a position for each pair, got "
                f"{self.frequencies!r}; use Rope.from_base(base, head_dim)"
            )
        if not isinstance(self.pairs, str) or self.pairs not in get_args(Pairs):
            raise ValueError(
                f"pairs: expected one of {get_args(Pairs)}, got {self.pairs!r}; "
                'use "half" for dimensions i and i + R / 2'
            )
        object.__setattr__(self, "frequencies", found)

    @classmethod
    def from_base(cls, base: float, head_dim: int, pairs: Pairs = "half") -> "Rope":
        """The frequencies base**(-2 i / head_dim), for all dimensions of a head."""
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
      horizon: positions that a copy is turned on by at the most.
      copies: of each key.
    """

    rope: Rope
    horizon: int
    copies: int

    @functools.cache  # noqa: B019  (a few objects, as static arguments are)
    def tables(self, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Float32 [TURNS, H] factors of a key and of its partners: see `turned`."""
        h = np.arange(head_dim)
        turns = self.horizon * (np.arange(TURNS) + 0.5) / TURNS
        turning = h < self.rope.dimensions
        frequency = np.asarray(self.rope.frequencies)[np.where(turning, self.rope.pair(h), 0)]
        angle = turns[:, None] * np.where(turning, frequency, 0)
        sign = np.where(self.rope.is_first(h), -1, 1)
        return np.cos(angle).astype(np.float32), (sign * np.sin(angle)).astype(np.float32)


def turn_of(token: Int32[Array, "*n"], copy: int, copies: int) -> Int32[Array, "*n"]:
    """Which of the `TURNS` a copy of a token is given.

    Turns are spread evenly over neighbouring tokens, and over the copies of a token. They depend
    on nothing else, so that neither a row's place nor its length matters.
    """
    # In int32, whose products wrap around.
    golden, offset = (np.uint32(x).view(np.int32) for x in (GOLDEN, copy * 2**32 // copies))
    spread = token * golden + offset
    return lax.shift_right_logical(spread, jnp.full_like(spread, 32 - TURNS.bit_length() + 1))


def turned(
    key: Float[Array, "*tokens H"], token: Int32[Array, "*#tokens"], copy: int, ahead: LookAhead
) -> Float[Array, "*tokens H"]:
    """A copy of keys, in float32, rounded to their dtype as keys that come later would be."""
    cos, sin = (jnp.asarray(x) for x in ahead.tables(key.shape[-1]))
    turn = turn_of(token, copy, ahead.copies)
    partner = ahead.rope.partner(np.arange(key.shape[-1]))
    own = key.astype(jnp.float32)
    return (own * cos[turn] + own[..., partner] * sin[turn]).astype(key.dtype).astype(jnp.float32)


def check_look_ahead(rope: Any, look_ahead: Any, copies: Any, head_dim: int) -> LookAhead | None:
    """The arguments of this name; ValueError for what they cannot be."""
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
    for name, value, most in (("look_ahead", look_ahead, 2**31 - 1), ("copies", copies, 8)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            fix = "the number of tokens that will be decoded" if name == "look_ahead" else "3"
            raise ValueError(f"{name}: expected an integer, got {value!r}; pass {fix}")
        if not 1 <= value <= most:
            raise ValueError(f"{name}: expected 1 to {most}, got {value}; choose one of these")
    return LookAhead(rope, int(look_ahead), int(copies))
