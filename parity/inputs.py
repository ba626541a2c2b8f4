"""Workloads: the shapes that are checked and measured, written once, and their inputs in numpy.

Letters are those of CONTRACT.md, section 2.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jax_indexer import IndexerConfig, build_index
from jax_indexer.data import load_sample

SCORES = ("random", "equal", "ascending")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One decode step: shapes, lengths and config.

    Attributes:
      name: what `--workload` calls it.
      B: batch rows.
      T: query tokens of the step.
      N: query heads.
      K: key/value heads; N // K query heads share one.
      H: head dimension.
      S: capacity in tokens; None means the longest row.
      L: tokens in the cache after the step, its own T included: one number or one a row.
      config: the IndexerConfig.
      dtype: of queries, keys and codebooks.
      weights: whether the dense weight rows are asked for.
      sample: take queries and keys from the real sample that ships with jax_indexer; B, T, L and
        the config still hold, N, K and H must be the sample's.
      scores: how the scores of the tokens lie, one of SCORES: "random"; "equal", all tie;
        "ascending", so that all winners are neighbours.
      seed: of the inputs.
    """

    name: str
    B: int = 1
    T: int = 1
    N: int
    K: int
    H: int = 128
    S: int | None = None
    L: int | tuple[int, ...]
    config: IndexerConfig = dataclasses.field(default_factory=IndexerConfig)
    dtype: str = "bfloat16"
    weights: bool = False
    sample: bool = False
    scores: str = "random"
    seed: int = 0

    def __post_init__(self):
        if self.scores not in SCORES:
            raise ValueError(f"scores: expected one of {', '.join(SCORES)}, got {self.scores}")
        if len(self.lengths) != self.B:
            raise ValueError(
                f"L: expected one number or {self.B}, got {len(self.lengths)}; one a row"
            )
        for name in ("B", "T", "N", "K", "H", "capacity"):
            if getattr(self, name) < 1:
                letter = "S" if name == "capacity" else name
                raise ValueError(
                    f"{letter}: expected at least 1, got {getattr(self, name)}; make it larger"
                )
        if self.N % self.K:
            raise ValueError(f"N: expected a multiple of K={self.K}, got {self.N}; change either")
        if self.H % self.config.num_subspaces:
            raise ValueError(
                f"H: expected a multiple of num_subspaces={self.config.num_subspaces}, "
                f"got {self.H}; change either"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """L of every row."""
        return (self.L,) * self.B if isinstance(self.L, int) else self.L

    @property
    def capacity(self) -> int:
        """S, resolved."""
        return max(self.lengths) if self.S is None else self.S


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arrays of one decode step, shared by all implementations: never write to them.

    Attributes:
      query: [B, T, N, H].
      key_new: [B, T, K, H], the keys that the step appends.
      codebooks: [B, K, M, C, D'].
      codes: uint8[B, K, M, S], of every position: past a row's length they are garbage, and the
        step overwrites its own T.
      lengths: int32[B], tokens in the cache after the step; the step starts at lengths - T.
      phi: float32[B, K, M] for the inner-product metric, else None.
      key: [B, S, K, H], all keys, for the real sample only.
      value: [B, S, K, H], all values, for the real sample only.
    """

    query: np.ndarray
    key_new: np.ndarray
    codebooks: np.ndarray
    codes: np.ndarray
    lengths: np.ndarray
    phi: np.ndarray | None = None
    key: np.ndarray | None = None
    value: np.ndarray | None = None


def make_inputs(workload: Workload, *, integers: int | None = None) -> Inputs:
    """Draws the inputs of a workload from its seed.

    Codebooks and codes are drawn, not trained (except for the real sample), and there are no old
    keys, so that a million tokens need no more memory than their codes.

    Args:
      workload: shapes and seed.
      integers: draw queries, keys and codebooks from the integers -integers..integers instead of
        a normal distribution: look-up tables, and all that follows, are then exact in float32 as
        long as D * integers**2 is below 2**24.

    Returns:
      The arrays, queries, keys and codebooks in the workload's dtype.

    Raises:
      ValueError: for integers that would not be exact, and for a sample of other heads.
    """
    if workload.sample:
        if integers is not None:
            raise ValueError(f"integers: expected None for the sample, got {integers}; omit it")
        return _sample_inputs(workload)
    w, config = workload, workload.config
    subspace_dim = w.H // config.num_subspaces
    dtype = jnp.dtype(w.dtype)
    if integers is not None and (
        subspace_dim * integers**2 >= 2**24 or dtype.type(integers) != integers
    ):
        raise ValueError(
            f"integers: expected numbers exact in {w.dtype} with D * integers**2 < 2**24, "
            f"got {integers} with D={subspace_dim}; make them smaller"
        )
    rng = np.random.default_rng(w.seed)

    def draw(*shape):
        if integers is None:
            return rng.standard_normal(shape, np.float32).astype(dtype)
        return rng.integers(-integers, integers, shape, endpoint=True).astype(dtype)

    augmented = config.metric == "ip"
    heads = (w.B, w.K, config.num_subspaces)
    codebooks = draw(*heads, config.num_centroids, subspace_dim + augmented)
    inputs = Inputs(
        query=draw(w.B, w.T, w.N, w.H),
        key_new=draw(w.B, w.T, w.K, w.H),
        codebooks=codebooks,
        codes=rng.integers(0, config.num_centroids, (*heads, w.capacity), np.uint8, endpoint=False),
        lengths=np.asarray(w.lengths, np.int32),
        phi=np.full(heads, 2 * subspace_dim, np.float32) if augmented else None,
    )
    if w.scores == "equal":
        return dataclasses.replace(inputs, query=np.zeros_like(inputs.query))
    if w.scores == "ascending":
        return _ascending(w, inputs)
    return inputs


def _ascending(w: Workload, inputs: Inputs) -> Inputs:
    """Inputs whose scores never fall from one position to the next, in steps of one.

    The codes of the first two subspaces are the digits of a rank that grows with the position, and
    the centroids are their value. All numbers are exact, in bfloat16 too.
    """
    centroids, subspace_dim = w.config.num_centroids, w.H // w.config.num_subspaces
    digits = min(w.config.num_subspaces, 2)
    rank = np.arange(w.capacity) * centroids**digits // w.capacity
    codes, codebooks = np.zeros_like(inputs.codes), np.zeros_like(inputs.codebooks)
    for m in range(digits):
        place = centroids ** (digits - 1 - m)
        codes[:, :, m] = rank // place % centroids
        value = np.arange(centroids) * place / subspace_dim
        codebooks[:, :, m, :, :subspace_dim] = value[:, None]
    return dataclasses.replace(
        inputs, query=np.ones_like(inputs.query), codes=codes, codebooks=codebooks
    )


def _sample_inputs(w: Workload) -> Inputs:
    """The sample's keys in every row, codebooks trained on its length, its own query positions."""
    sample = load_sample()
    positions, N, H = sample.query.shape
    tokens, K, _ = sample.key.shape
    heads = w.N, w.K, w.H
    if heads != (N, K, H):
        raise ValueError(
            f"N, K, H: expected the sample's {N}, {K}, {H}, got {w.N}, {w.K}, {w.H}; "
            "change them, or use sample=False"
        )
    if w.capacity > tokens:
        raise ValueError(f"S: expected at most the sample's {tokens}, got {w.capacity}; lower L")
    dtype = jnp.dtype(w.dtype)
    rng = np.random.default_rng(w.seed)
    starts = positions - w.T + 1
    first = rng.choice(starts, w.B, replace=starts < w.B)
    key, value = (
        np.broadcast_to(x[: w.capacity].astype(dtype), (w.B, w.capacity, K, H))
        for x in (sample.key, sample.value)
    )
    lengths = np.asarray(w.lengths, np.int32)
    index = build_index(jnp.asarray(key), jnp.asarray(lengths), w.config, seed=w.seed)
    own = np.maximum(lengths - w.T, 0)[:, None] + np.arange(w.T)
    return Inputs(
        query=sample.query[first[:, None] + np.arange(w.T)].astype(dtype),
        key_new=np.stack([key[b, own[b]] for b in range(w.B)]),
        codebooks=np.asarray(index.codebooks),
        codes=np.asarray(index.codes),
        lengths=lengths,
        phi=None if index.phi is None else np.asarray(index.phi),
        key=key,
        value=value,
    )


def _spread(low: int, high: int, count: int) -> tuple[int, ...]:
    """`count` lengths in equal ratios from `low` to `high`, both included."""
    return tuple(round(low * (high / low) ** (i / (count - 1))) for i in range(count))


FINE = IndexerConfig(num_subspaces=16, num_bits=8)
FINE_BF16 = dataclasses.replace(FINE, table_dtype=jnp.bfloat16)

# What is measured.
WORKLOADS = {
    w.name: w
    for w in (
        # The workload of the document this project comes from.
        Workload(name="seed", N=32, K=32, L=32000, dtype="float32", weights=True),
        Workload(name="llama-32k", N=32, K=8, L=32768),
        Workload(name="llama-128k-b4", B=4, N=32, K=8, L=131072),
        Workload(name="fine-128k-b4", B=4, N=32, K=8, L=131072, config=FINE),
        Workload(name="fine-128k-b4-bf16", B=4, N=32, K=8, L=131072, config=FINE_BF16),
        Workload(name="million", N=32, K=8, L=1048576),
        Workload(name="wide", B=4, N=32, K=8, L=131072, config=IndexerConfig(heavy_size=2048)),
        Workload(name="ragged", B=16, N=32, K=8, L=_spread(100, 131072, 16)),
        Workload(
            name="real", B=8, N=3, K=1, H=64, L=_spread(1024, 8192, 8), dtype="float16", sample=True
        ),
        # The same context in a cache of its size and in one for a million tokens.
        Workload(name="short", N=32, K=8, L=4096),
        Workload(name="short-in-million", N=32, K=8, S=1048576, L=4096),
        Workload(name="ties", B=4, N=32, K=8, L=131072, scores="equal"),
        Workload(name="sorted", B=4, N=32, K=8, L=131072, scores="ascending"),
    )
}

_SIZES = {"heavy_size": 12, "sink_size": 5, "window_size": 7}

# What every implementation is checked on: one feature each, in a second on a CPU.
SMALL = {
    w.name: w
    for w in (
        Workload(
            name="small", B=2, N=4, K=4, H=16, S=256, L=200, dtype="float32", weights=True,
            config=IndexerConfig(num_bits=4, **_SIZES),
        ),
        Workload(
            name="small-grouped", B=2, N=8, K=2, H=32, S=256, L=(256, 131),
            config=IndexerConfig(num_subspaces=4, num_bits=5, **_SIZES),
        ),
        Workload(
            name="small-ip", B=2, N=4, K=2, H=16, S=256, L=200, dtype="float32",
            config=IndexerConfig(num_bits=4, metric="ip", **_SIZES),
        ),
        Workload(
            name="small-three-queries", B=2, T=3, N=4, K=2, H=16, S=256, L=(200, 2),
            dtype="float16", config=IndexerConfig(num_bits=4, **_SIZES),
        ),
        Workload(
            name="small-short", B=3, N=4, K=2, H=16, S=64, L=(1, 30, 33), dtype="float32",
            weights=True, config=IndexerConfig(num_bits=4, **_SIZES),
        ),
        Workload(
            name="small-offset", B=2, N=4, K=2, H=16, S=256, L=(200, 250), dtype="float32",
            config=IndexerConfig(num_bits=4, init_offset=20, **_SIZES),
        ),
        Workload(
            name="small-ties", N=4, K=2, H=16, L=200, scores="equal",
            config=IndexerConfig(num_bits=4, **_SIZES),
        ),
        Workload(
            name="small-sorted", N=4, K=2, H=16, L=200, scores="ascending",
            config=IndexerConfig(num_bits=4, **_SIZES),
        ),
        Workload(
            name="small-bf16-table", N=4, K=2, H=16, L=200,
            config=IndexerConfig(num_bits=4, table_dtype=jnp.bfloat16, **_SIZES),
        ),
    )
}  # fmt: skip
