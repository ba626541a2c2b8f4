"""The tie-aware comparison accepts every right answer and rejects every kind of wrong one."""

import numpy as np
import pytest

from jax_indexer import IndexerConfig
from parity.compare import check_selection

# Sinks 0..1, candidates 3..36, window 37..39; the short rule ends at 4 + 3 + 1 + 2 = 10 tokens.
CONFIG = IndexerConfig(
    num_subspaces=1, num_bits=1, heavy_size=4, sink_size=2, window_size=3, init_offset=3
)
VISIBLE = 40
CAPACITY = 48
LIST_SIZE = 12


def tied_scores():
    """Two clear winners (10, 20), six tokens tied at the cut, everything else clearly below."""
    scores = np.full(CAPACITY, -1.0)
    scores[[10, 20]] = 5.0
    scores[[5, 12, 18, 25, 30, 36]] = 2.0
    scores[2] = 99.0  # sink_size <= 2 < init_offset: never a candidate
    scores[VISIBLE:] = np.nan
    return scores


def selected(heavy, *, size=LIST_SIZE):
    chosen = np.sort(np.array([0, 1, *heavy, 37, 38, 39]))
    return np.concatenate([chosen, np.full(size - len(chosen), -1)]), len(chosen)


def check(indices, count, scores=None, *, visible=VISIBLE, config=CONFIG, atol=0.0):
    scores = tied_scores() if scores is None else scores
    check_selection(indices, np.int32(count), scores, np.int32(visible), config, atol=atol)


@pytest.mark.parametrize("ties", [(5, 12), (5, 36), (30, 36), (18, 25)])
def test_any_choice_among_ties_is_accepted(ties):
    check(*selected([10, 20, *ties]))


@pytest.mark.parametrize(
    ("heavy", "complaint"),
    [
        ([10, 20, 5, 6], "losers taken: .*6"),
        ([10, 5, 12, 18], "winners missing: .*20"),
        ([10, 20, 5], "expected 4 heavy tokens, got 3"),
        ([10, 20, 5, 12, 18], "expected 4 heavy tokens, got 5"),
        ([10, 20, 5, 2], "no candidates: .*2"),
        ([10, 20, 5, 40], "invisible tokens .*40"),
        ([10, 20, 5, -2], "invisible tokens .*-2"),
        ([10, 20, 5, 5], "repeated tokens .*5"),
        ([10, 20, 5, 38], "repeated tokens .*38"),
    ],
)
def test_a_planted_wrong_list_is_rejected(heavy, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check(*selected(heavy))


@pytest.mark.parametrize("lost", [0, 1, 37, 39])
def test_a_missing_sink_or_window_token_is_rejected(lost):
    indices, count = selected([10, 20, 5, 12])
    indices = np.append(indices[indices != lost], -1)
    with pytest.raises(AssertionError, match=f"sink or window tokens missing: .*{lost}"):
        check(indices, count - 1)


def test_a_wrong_order_is_rejected():
    indices, count = selected([10, 20, 5, 12])
    indices[[3, 4]] = indices[[4, 3]]
    with pytest.raises(AssertionError, match="not ascending"):
        check(indices, count)


@pytest.mark.parametrize(("change", "complaint"), [(1, "invisible"), (-1, "past the count")])
def test_a_wrong_count_is_rejected(change, complaint):
    indices, count = selected([10, 20, 5, 12])
    with pytest.raises(AssertionError, match=complaint):
        check(indices, count + change)


@pytest.mark.parametrize("count", [-1, LIST_SIZE + 1])
def test_an_impossible_count_is_rejected(count):
    with pytest.raises(AssertionError, match="count outside"):
        check(selected([10, 20, 5, 12])[0], count)


@pytest.mark.parametrize("garbage", [0, 39, 7, -7])
def test_garbage_in_the_tail_is_rejected(garbage):
    indices, count = selected([10, 20, 5, 12])
    indices[-1] = garbage
    with pytest.raises(AssertionError, match=f"past the count, got .*{garbage}"):
        check(indices, count)


def test_the_margin_frees_only_tokens_that_close_to_the_cut():
    scores = tied_scores()
    scores[6], scores[7] = 1.9, 1.7
    check(*selected([10, 20, 5, 6]), scores, atol=0.2)
    with pytest.raises(AssertionError, match=r"losers taken: .*7"):
        check(*selected([10, 20, 5, 7]), scores, atol=0.2)
    scores[6], scores[10] = 1.0, 2.1
    check(*selected([20, 5, 12, 18]), scores, atol=0.2)
    scores[10] = 2.3
    with pytest.raises(AssertionError, match=r"winners missing: .*10"):
        check(*selected([20, 5, 12, 18]), scores, atol=0.2)


def test_the_margin_may_differ_by_row():
    scores = np.stack([tied_scores()] * 2)
    scores[:, 6] = 1.9
    indices, count = selected([10, 20, 5, 6])
    rows = np.stack([indices] * 2), np.array([count] * 2), scores, np.array([VISIBLE] * 2)
    check_selection(*rows, CONFIG, atol=0.2)
    with pytest.raises(AssertionError, match=r"row \(1,\)"):
        check_selection(*rows, CONFIG, atol=np.array([0.2, 0.0]))


def test_infinite_scores_are_clear():
    scores = tied_scores()
    scores[10], scores[20], scores[5] = np.inf, np.inf, -np.inf
    check(*selected([10, 20, 12, 18]), scores, atol=1.0)
    with pytest.raises(AssertionError, match=r"losers taken: .*5"):
        check(*selected([10, 20, 12, 5]), scores, atol=1.0)
    with pytest.raises(AssertionError, match=r"winners missing: .*20"):
        check(*selected([10, 12, 18, 25]), scores, atol=1.0)


def test_nan_ranks_below_minus_infinity():
    scores = np.full(CAPACITY, np.nan)
    scores[[10, 20]] = 0.0
    scores[[12, 18, 30]] = -np.inf
    check(*selected([10, 20, 12, 30]), scores)
    with pytest.raises(AssertionError, match=r"losers taken: .*5"):
        check(*selected([10, 20, 12, 5]), scores)


def test_nans_are_free_when_numbers_run_out():
    scores = np.full(CAPACITY, np.nan)
    scores[[10, 20]] = -np.inf, 3.0
    check(*selected([10, 20, 5, 36]), scores)
    with pytest.raises(AssertionError, match=r"winners missing: .*10"):
        check(*selected([20, 5, 6, 36]), scores)


def test_fewer_candidates_than_budget_are_all_expected():
    config = IndexerConfig(
        num_subspaces=1, num_bits=1, heavy_size=4, sink_size=8, window_size=3, init_offset=0
    )
    everything = np.append(np.arange(13), [-1, -1])  # candidates 8 and 9 only
    check(everything, 13, visible=13, config=config)
    with pytest.raises(AssertionError, match="expected 2 heavy tokens, got 1"):
        check(np.append(np.delete(everything, 9), -1), 12, visible=13, config=config)


@pytest.mark.parametrize("visible", [0, 1, 10])
def test_a_short_context_must_be_complete(visible):
    everything = np.append(np.arange(visible), np.full(2, -1))
    check(everything, visible, visible=visible)
    if visible:
        with pytest.raises(AssertionError, match=f"without tokens .*{visible - 1}"):
            check(np.append(everything[: visible - 1], [-1] * 3), visible - 1, visible=visible)


def test_the_short_rule_counts_query_tokens():
    everything = np.arange(11)
    score = np.arange(CAPACITY, dtype=float)
    arguments = everything, np.int32(11), score, np.int32(11), CONFIG
    check_selection(*arguments, atol=0.0, num_query_tokens=2)
    with pytest.raises(AssertionError, match=r"no candidates: .*2"):
        check_selection(*arguments, atol=0.0, num_query_tokens=1)


def test_no_budget_means_no_heavy_tokens():
    config = IndexerConfig(
        num_subspaces=1, num_bits=1, heavy_size=0, sink_size=2, window_size=3, init_offset=3
    )
    check(*selected([]), config=config)
    with pytest.raises(AssertionError, match="expected 0 heavy tokens, got 1"):
        check(*selected([10]), config=config)


def test_the_row_is_named():
    indices, count = selected([10, 20, 5, 12])
    indices = np.tile(indices, (2, 3, 1))
    counts, visible = np.full((2, 3), count), np.full((2, 3), VISIBLE)
    scores = np.tile(tied_scores(), (2, 3, 1))
    check_selection(indices, counts, scores, visible, CONFIG, atol=0.0)
    scores[1, 2, 6] = 50.0
    with pytest.raises(AssertionError, match=r"row \(1, 2\) \(V=40, count=9\): clear winners"):
        check_selection(indices, counts, scores, visible, CONFIG, atol=0.0)


@pytest.mark.parametrize("name", ["indices", "scores", "visible"])
def test_leading_axes_must_agree(name):
    arrays = {
        "indices": np.zeros((2, LIST_SIZE), np.int32),
        "counts": np.zeros(2, np.int32),
        "scores": np.zeros((2, CAPACITY)),
        "visible": np.zeros(2, np.int32),
    }
    arrays[name] = arrays[name][:1]
    with pytest.raises(AssertionError, match=f"{name}: expected leading axes"):
        check_selection(**arrays, config=CONFIG, atol=0.0)
