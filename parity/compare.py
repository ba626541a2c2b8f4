"""The comparison of two selections that may break ties differently."""

import numpy as np


def check_selection(indices, counts, scores, visible, config, *, atol, num_query_tokens=1):
    """Raises AssertionError, naming the row, unless every row is a right answer for its scores.

    What scores do not decide must be exact: which tokens are always attended, which may be chosen,
    how many, and that the list ascends without repetition and ends in -1. Among the candidates,
    every token clearly above the cut (the heavy_size-th best score) must be in and every token
    clearly below it out. Two evaluations of one score that are each off by at most e can disagree
    about tokens within 2 e of the cut, so `atol` is 2 e; at 0 only equal scores are free.

    Args:
      indices: int[..., P], the list of each row, -1 past its count.
      counts: int[...], the length of each list.
      scores: float64[..., S], the exact scores; NaN ranks below -inf.
      visible: int[...], the visible tokens V of each row (section 3 of the contract).
      config: the IndexerConfig.
      atol: how far from the cut a score must be to count as clear: a number, or float[...].
      num_query_tokens: T of the step, which the short-context rule contains.
    """
    indices, counts, scores, visible = map(np.asarray, (indices, counts, scores, visible))
    leading = counts.shape
    for name, found in (
        ("indices", indices.shape[:-1]),
        ("scores", scores.shape[:-1]),
        ("visible", visible.shape),
    ):
        if found != leading:
            raise AssertionError(f"{name}: expected leading axes {leading}, got {found}")
    atol = np.broadcast_to(np.asarray(atol, np.float64), leading)
    for row in np.ndindex(leading):
        problem = _problem(
            indices[row],
            int(counts[row]),
            scores[row],
            int(visible[row]),
            config,
            float(atol[row]),
            num_query_tokens,
        )
        if problem:
            raise AssertionError(f"row {row} (V={visible[row]}, count={counts[row]}): {problem}")


def _problem(indices, count, scores, visible, config, atol, num_query_tokens):
    """What is wrong with one row, or None."""
    if not 0 <= count <= len(indices):
        return f"count outside 0..{len(indices)}"
    if visible > len(scores):
        return f"V exceeds the {len(scores)} scores"
    chosen, tail = indices[:count], indices[count:]
    if (tail != -1).any():
        return f"expected -1 past the count, got {_few(tail[tail != -1])}"
    if count and (chosen.min() < 0 or chosen.max() >= visible):
        return f"invisible tokens {_few(chosen[(chosen < 0) | (chosen >= visible)])}"
    if (np.diff(chosen) == 0).any():
        return f"repeated tokens {_few(chosen[1:][np.diff(chosen) == 0])}"
    if (np.diff(chosen) < 0).any():
        return f"not ascending before tokens {_few(chosen[1:][np.diff(chosen) < 0])}"

    position = np.arange(visible)
    taken = np.zeros(visible, bool)
    taken[chosen] = True
    short = config.heavy_size + config.first_trained + num_query_tokens + 2**config.num_bits
    if visible <= short:
        return None if taken.all() else f"short context without tokens {_few(position[~taken])}"

    always = (position < config.sink_size) | (position >= visible - config.window_size)
    if (always & ~taken).any():
        return f"sink or window tokens missing: {_few(position[always & ~taken])}"
    candidate = (position >= config.first_trained) & ~always
    if (taken & ~always & ~candidate).any():
        return f"tokens that are no candidates: {_few(position[taken & ~always & ~candidate])}"
    heavy = min(config.heavy_size, int(candidate.sum()))
    found = int((taken & candidate).sum())
    if found != heavy:
        return f"expected {heavy} heavy tokens, got {found}"
    if heavy == 0:
        return None

    score = scores[:visible]
    nan = np.isnan(score)
    cut = np.sort(np.where(nan, -np.inf, score)[candidate])[-heavy]
    if int((candidate & ~nan).sum()) < heavy:  # the cut runs among the NaNs
        above, below = ~nan, np.zeros(visible, bool)
    else:
        above, below = score > cut + atol, nan | (score < cut - atol)
    missing = position[candidate & above & ~taken]
    if len(missing):
        return f"clear winners missing: {_few(missing, score)}; the cut is {cut}"
    wrong = position[candidate & below & taken]
    if len(wrong):
        return f"clear losers taken: {_few(wrong, score)}; the cut is {cut}"
    return None


def _few(positions, scores=None):
    shown = [int(p) if scores is None else (int(p), float(scores[p])) for p in positions[:5]]
    more = f" and {len(positions) - 5} more" if len(positions) > 5 else ""
    return f"{shown}{more}"
