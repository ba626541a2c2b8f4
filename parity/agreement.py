"""The check before timing: what an implementation selects must be right for the exact scores."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from parity import oracle
from parity.compare import check_selection
from parity.inputs import Inputs, Workload

KEPT_BYTES = 2 * 2**30  # of exact scores


def num_candidates(w: Workload) -> int:
    """Candidates of the longest row."""
    return max(max(w.lengths) - w.config.window_size - w.config.first_candidate, 0)


def top_k_size(w: Workload) -> int:
    """How many candidates a top-k alone chooses; NotImplementedError where there is no choice."""
    size = min(w.config.heavy_size, num_candidates(w))
    if size == 0:
        raise NotImplementedError("a budget or a context without anything to choose")
    return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists:
    """What a decode step of one batch row selected.

    Attributes:
      indices: int[T, N, P], -1 past the count.
      counts: int[T, N].
      weights: 0/1 numbers [T, N, L or more], or None.
    """

    indices: np.ndarray
    counts: np.ndarray
    weights: np.ndarray | None


class Reference:
    """Exact scores of a workload, computed a row of tokens at a time and kept while they are few.

    Attributes:
      workload: the workload.
      inputs: its inputs.
      right: lists that were found right, so that those who agree are checked once.
    """

    def __init__(self, workload: Workload, inputs: Inputs):
        self.workload = workload
        self.inputs = inputs
        self.right: set[tuple] = set()
        self._kept: dict[tuple[int, int, int], np.ndarray] | None = None
        if 8 * workload.T * workload.N * sum(workload.lengths) <= KEPT_BYTES:
            self._kept = {}
        config = workload.config
        table = oracle.exact_table(inputs.query, inputs.codebooks)
        self._table = table
        if config.table_dtype != np.float32:
            self._table = oracle.rounded(table, config.table_dtype).astype(np.float64)
        self._codes = inputs.codes.copy()
        new, _ = oracle.encode(inputs.key_new, inputs.codebooks, inputs.phi)
        for b, length in enumerate(workload.lengths):
            self._codes[b, :, :, length - workload.T : length] = new[b]

    def visible(self, b: int, t: int) -> int:
        """V of the contract."""
        return max(self.workload.lengths[b] - (self.workload.T - 1 - t), 0)

    def scores(self, b: int, t: int, n: int) -> np.ndarray:
        """float64 scores of the visible tokens of one query head."""
        if self._kept is None:
            return self._scores(b, t, n)
        if (b, t, n) not in self._kept:
            self._kept[b, t, n] = self._scores(b, t, n)
        return self._kept[b, t, n]

    def _scores(self, b: int, t: int, n: int) -> np.ndarray:
        head = n // (self.workload.N // self.workload.K)
        codes = self._codes[b : b + 1, head : head + 1, :, : self.visible(b, t)]
        table = self._table[b : b + 1, t : t + 1, n : n + 1]
        return oracle.scores(table, codes, self.workload.config.num_bits)[0, 0, 0]

    def atol(self, b: int, t: int, n: int) -> float:
        """How far apart two right float32 evaluations of a score can be, for one query head.

        A sum of D products and then M entries is off by at most (D + M) / 2**24 of the sum of
        magnitudes, in any order of addition, and two of them may err in opposite directions. A
        table of a narrower type may round an entry to the other neighbour.
        """
        w, config = self.workload, self.workload.config
        head, subspace_dim = n // (w.N // w.K), w.H // config.num_subspaces
        query = np.abs(self.inputs.query[b, t, n].astype(np.float64)).reshape(-1, subspace_dim)
        centroids = self.inputs.codebooks[b, head, ..., :subspace_dim].astype(np.float64)
        magnitude = np.einsum("md,mcd->mc", query, np.abs(centroids)).max(axis=1).sum()
        error = 2 * (subspace_dim + config.num_subspaces) * 2.0**-24 * magnitude
        if config.table_dtype != np.float32:
            bits = {"bfloat16": 8, "float16": 11}[config.table_dtype.name]
            error += 2 * 2.0 ** (1 - bits) * np.abs(self._table[b, t, n]).max(axis=1).sum()
        return float(error)

    @functools.cached_property
    def candidate_scores(self) -> np.ndarray:
        """float32 scores of all candidates, a row a query head, padded with -inf to one length."""
        w, config = self.workload, self.workload.config
        size = num_candidates(w)
        out = np.full((w.B, w.T, w.N, size), -np.inf, np.float32)

        def fill(b: int, t: int, n: int) -> None:
            last = max(self.visible(b, t) - config.window_size, 0)
            found = self.scores(b, t, n)[config.first_candidate : last]
            out[b, t, n, : len(found)] = found

        _for_each(np.ndindex(w.B, w.T, w.N), fill)
        return out.reshape(-1, size)


def _for_each(rows: Iterable[tuple[int, ...]], function: Callable[..., None]) -> None:
    """Calls function(*row) for every row, in threads; the first failed row raises."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda row: function(*row), rows):
            pass


def check_lists(reference: Reference, lists: Callable[[int], Lists]) -> None:
    """Checks the lists of every query head against the exact scores, ties at the cut aside.

    Args:
      reference: exact scores.
      lists: gives the lists of a batch row; asked for each row once, in order.

    Raises:
      AssertionError: naming the first row that is wrong.
    """
    w = reference.workload
    for b in range(w.B):
        found = lists(b)

        def check(t: int, n: int, b: int = b, found: Lists = found) -> None:
            row = f"batch row {b}, query token {t}, head {n}"
            indices, count = found.indices[t, n], int(found.counts[t, n])
            key = (b, t, n, count, indices[:count].astype(np.int32).tobytes())
            if key not in reference.right or (indices[count:] != -1).any():
                try:
                    check_selection(
                        indices,
                        count,
                        reference.scores(b, t, n),
                        reference.visible(b, t),
                        w.config,
                        atol=reference.atol(b, t, n),
                        num_query_tokens=w.T,
                    )
                except AssertionError as error:
                    raise AssertionError(f"{row}: {error}") from None
                reference.right.add(key)
            if found.weights is not None:
                wanted = np.zeros(found.weights.shape[-1], found.weights.dtype)
                wanted[indices[:count]] = 1
                wrong = np.flatnonzero(found.weights[t, n] != wanted)
                if wrong.size:
                    raise AssertionError(
                        f"{row}: weight {found.weights[t, n, wrong[0]]} at token {wrong[0]}, "
                        f"which the list {'has' if wanted[wrong[0]] else 'does not have'}"
                    )

        _for_each(np.ndindex(w.T, w.N), check)


def check_top_k(scores: np.ndarray, values: np.ndarray, indices: np.ndarray) -> None:
    """Checks a top-k of float32 rows: the k largest values, and where they are.

    Args:
      scores: float32[R, L].
      values: float32[R, k], in any order.
      indices: int[R, k].

    Raises:
      AssertionError: naming the first row that is wrong.
    """
    k = values.shape[1]

    def check(row: int) -> None:
        score, value, index = scores[row], values[row], indices[row]
        wanted = np.sort(np.partition(score, len(score) - k)[-k:])
        if not np.array_equal(np.sort(value), wanted):
            raise AssertionError(f"row {row}: values differ from the {k} largest scores")
        if len(np.unique(index)) != k or not np.array_equal(score[index], value):
            raise AssertionError(f"row {row}: positions do not name {k} tokens with these scores")

    _for_each(np.ndindex(len(scores)), check)
