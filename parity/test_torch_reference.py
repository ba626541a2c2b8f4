"""The PyTorch/Triton original: its forms agree, keep their oddities, and refuse bad input.

Without a GPU the Triton kernels run in Triton's interpreter.
"""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_reference
from jax_indexer import IndexerConfig
from parity.compare import check_selection
from torch_reference import (
    ITERATIONS,
    capture,
    encode,
    indexer_first,
    iteration1,
    iteration2,
    iteration3,
    iteration4,
    sparse_attention,
)
from torch_reference.selection import Parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = list(ITERATIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One decode step: the shapes, the sizes of the lists, and how many keys are new."""

    b: int = 1
    h: int = 2
    h_kv: int = 2
    sq: int = 1
    sk: int = 150
    d: int = 16
    n_subvec: int = 2
    bits: int = 4
    sink_size: int = 8
    window_size: int = 12
    heavy_size: int = 16
    init_offset: int = 8
    metric: str = "euclidean"
    dtype: torch.dtype = torch.float32
    centroid_dtype: torch.dtype | None = None
    new: int = 1
    distinct: bool = False

    @property
    def options(self) -> dict:
        names = ("sink_size", "window_size", "heavy_size", "init_offset", "metric")
        return {name: getattr(self, name) for name in names}

    @property
    def config(self) -> IndexerConfig:
        return IndexerConfig(num_subspaces=self.n_subvec, num_bits=self.bits, **self.options)


@dataclasses.dataclass(frozen=True)
class Step:
    """The arguments of a decode step, and the codes that all tokens must end up with."""

    case: Case
    arguments: tuple[torch.Tensor, ...]
    options: dict
    codes: torch.Tensor

    def __call__(self, form: str, **changes):
        return ITERATIONS[form](*self.arguments, **(self.options | changes))

    @functools.cached_property
    def exact_scores(self) -> np.ndarray:
        """float64 [b, h, sq, sk], 0 without codes."""
        return self._sum_entries(lambda x: x)

    @functools.cached_property
    def score_error(self) -> np.ndarray:
        """float64 [b, h, sq]: how far float32 may be off, by half an ulp in each of d additions."""
        magnitude = self._sum_entries(np.abs).max(-1, initial=0)
        return self.case.d * 2.0**-24 * magnitude

    def _sum_entries(self, of) -> np.ndarray:
        case = self.case
        query, _, centroids = (of(x.double().cpu().numpy()) for x in self.arguments[:3])
        codes = self.codes.cpu().numpy()
        scores = np.zeros((case.b, case.h, case.sq, case.sk))
        for b, h, t, m in np.ndindex(*scores.shape[:3], case.n_subvec):
            kv = h // (case.h // case.h_kv)
            subquery = query[b, h, t].reshape(case.n_subvec, -1)[m]
            table = centroids[b, kv, m, :, : len(subquery)] @ subquery
            scores[b, h, t, case.init_offset :] += table[codes[b, kv, :, m]]
        return scores


def make_step(case: Case, seed: int = 0) -> Step:
    """Keys that are made of centroids, so that their codes are known; `distinct`: no two alike."""
    generator = torch.Generator().manual_seed(seed)
    heads = (case.b, case.h_kv)
    cent_cnt, subvec_d = 2**case.bits, case.d // case.n_subvec
    query = torch.randn(case.b, case.h, case.sq, case.d, generator=generator)
    centroids = torch.randn(*heads, case.n_subvec, cent_cnt, subvec_d, generator=generator)
    centroid_dtype = case.centroid_dtype or case.dtype
    centroids = centroids.to(case.dtype).to(centroid_dtype)
    if case.distinct:
        cells = cent_cnt**case.n_subvec
        picked = torch.rand(*heads, cells, generator=generator).argsort(-1)[..., : case.sk, None]
        codes = picked // cent_cnt ** torch.arange(case.n_subvec) % cent_cnt
    else:
        codes = torch.randint(cent_cnt, (*heads, case.sk, case.n_subvec), generator=generator)
    index = codes.transpose(2, 3).unsqueeze(-1).expand(-1, -1, -1, -1, subvec_d)
    keys = centroids.gather(3, index).transpose(2, 3).flatten(3).to(case.dtype)
    options = dict(case.options)
    if case.metric == "ip":
        norm = centroids.float().square().sum(-1, keepdim=True)
        phi = norm.amax((3, 4))
        extra = (phi[..., None, None] - norm).clamp(min=0).sqrt().to(centroid_dtype)
        centroids = torch.cat([centroids, extra], dim=-1)
        options["ip2l2_phi"] = phi.to(DEVICE)
    codes = codes[:, :, case.init_offset :].contiguous()
    known = codes[:, :, : max(codes.shape[2] - case.new, 0)]
    arguments = (query.to(case.dtype), keys, centroids, known.contiguous())
    return Step(case, tuple(x.to(DEVICE) for x in arguments), options, codes.to(DEVICE))


def check_step(step: Step, outputs):
    """Asserts that list, weights and codes are a right answer of this decode step."""
    case = step.case
    sparse_list, sparse_len, weight_list, codebook = outputs
    check_selection(
        sparse_list.cpu().numpy(),
        sparse_len.cpu().numpy(),
        step.exact_scores[:, :, 0],
        np.full((case.b, case.h), case.sk),
        case.config,
        atol=2 * step.score_error[:, :, 0],
        num_query_tokens=case.sq,
    )
    assert sparse_list.dtype == sparse_len.dtype == codebook.dtype == torch.int64
    assert sparse_list.shape[-1] == int(sparse_len.max())
    check_weights(case, sparse_list, weight_list)
    assert torch.equal(codebook, step.codes)


def check_weights(case: Case, sparse_list, weight_list):
    """Asserts that every query token's weights are 1 at the listed tokens and 0 elsewhere."""
    expected = np.zeros((case.b, case.h, case.sk))
    np.put_along_axis(expected, sparse_list.cpu().numpy(), 1, axis=-1)
    assert weight_list.dtype == case.dtype
    assert weight_list.shape == (case.b, case.h, case.sq, case.sk)
    found = weight_list.float().cpu().numpy()
    np.testing.assert_array_equal(
        found, np.broadcast_to(expected[:, :, None].astype(np.float32), found.shape)
    )


CASES = {
    "one head": Case(h=1, h_kv=1),
    "grouped queries": Case(h=6, h_kv=2),
    "batch rows": Case(b=3),
    "inner product": Case(metric="ip", h=4),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16, metric="ip"),
    "bfloat16 queries, float32 centroids": Case(
        dtype=torch.bfloat16, centroid_dtype=torch.float32, h=4
    ),
    "several query tokens": Case(sq=3, h=4, window_size=5),
    "one subspace": Case(n_subvec=1, bits=6, sk=200),
    "three subspaces of eight": Case(n_subvec=3, d=24),
    "subspaces wider than a block": Case(d=80, sk=140, n_subvec=1),
    "more keys than a block": Case(h=1, h_kv=1, sk=400),
    "a block exactly": Case(h=1, h_kv=1, sk=136),
    "eight bits": Case(bits=8, sk=310, heavy_size=5, window_size=200),
    "one centroid": Case(bits=1, n_subvec=1, window_size=2),
    "no new keys": Case(new=0),
    "three new keys": Case(new=3, h=4),
    "nothing encoded yet": Case(new=200),
    "sink before init_offset": Case(sink_size=3, init_offset=20),
    "no sink": Case(sink_size=0),
    "no window": Case(window_size=0),
    "no heavy": Case(heavy_size=0),
    "no sizes at all": Case(sink_size=0, window_size=0, heavy_size=0, init_offset=0),
    "budget of all candidates but one": Case(heavy_size=100, window_size=17, sk=126),
    "short context": Case(sk=41),
    "one over a short context": Case(sk=42),
    "short context, several queries": Case(sk=43, sq=3, h=4),
    "shorter than init_offset": Case(sk=5),
    "no keys": Case(sk=0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_every_form_selects_what_the_scores_decide(name, form):
    step = make_step(CASES[name])
    check_step(step, step(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [
        Case(h=4, sq=5, init_offset=0),
        Case(b=2, sq=2, metric="ip", dtype=torch.bfloat16),
        Case(h=1, h_kv=1, n_subvec=3, d=120, sk=137, init_offset=0),
    ],
    ids=["grouped queries", "inner product", "three subspaces of forty"],
)
def test_scores_are_the_inner_products_for_every_query_token(case, form):
    step = make_step(case)
    query, _, centroids, _ = step.arguments
    scores = ITERATIONS[form].scores(query, centroids, step.codes)
    assert scores.dtype == torch.float32
    difference = scores.double().cpu().numpy() - step.exact_scores[..., case.init_offset :]
    assert (np.abs(difference) <= step.score_error[..., None]).all()


@pytest.mark.parametrize("form", FORMS)
def test_iteration4_alone_masks_the_scores_in_place(form):
    scores = torch.zeros(1, 2, 1, 50, device=DEVICE)
    parts = Parts(tokens=58, sink=4, heavy=8, window=6, init_offset=8)
    ITERATIONS[form].lists(scores, parts, torch.float32)
    masked = 6 if form == "iteration4" else 0
    assert torch.equal(scores.isinf().sum(-1), torch.full((1, 2, 1), masked, device=DEVICE))


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize(
    "case",
    [
        Case(distinct=True, h=4),
        Case(distinct=True, b=2, metric="ip"),
        Case(distinct=True, dtype=torch.bfloat16),
    ],
    ids=["grouped queries", "inner product", "bfloat16"],
)
def test_without_ties_every_iteration_returns_what_eager_does(case, form):
    step = make_step(case)
    for expected, found in zip(step("eager"), step(form), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_arguments_are_left_as_they_were(form):
    step = make_step(Case(new=2))
    before = [x.clone() for x in step.arguments]
    step(form)
    assert all(torch.equal(x, y) for x, y in zip(before, step.arguments, strict=True))


# The oddities of the original.


@pytest.mark.parametrize("form", FORMS)
def test_window_tokens_are_listed_twice_when_candidates_run_out(form):
    case = Case(heavy_size=100, window_size=40)  # 102 candidates and 40 of the window among 142
    step = make_step(dataclasses.replace(case, sk=case.init_offset + 125))
    sparse_list, sparse_len, weight_list, _ = step(form)
    assert (sparse_len == case.sink_size + case.heavy_size + case.window_size).all()
    for row in sparse_list.cpu().reshape(-1, sparse_list.shape[-1]):
        tokens, times = row.unique(return_counts=True)
        assert torch.equal(row, row.sort().values)
        assert tokens.tolist() == list(range(step.case.sk))  # all 85 candidates were taken
        assert tokens[times == 2].min() >= step.case.sk - case.window_size
        assert (times == 2).sum() == case.heavy_size - 85
    check_weights(step.case, sparse_list, weight_list)


@pytest.mark.parametrize("form", FORMS)
def test_a_window_over_all_candidates_leaves_only_doubled_tokens(form):
    case = Case(window_size=148)  # starts before init_offset
    step = make_step(case)
    masked = torch.full((1, case.h, 1, case.sk - case.init_offset), float("-inf"), device=DEVICE)
    heavy = torch.topk(masked, case.heavy_size).indices[:, :, 0] + case.init_offset
    rest = torch.tensor([*range(case.sink_size), *range(2, case.sk)], device=DEVICE)
    expected = torch.cat([heavy, rest.expand(1, case.h, -1)], dim=-1).sort().values
    assert torch.equal(step(form)[0], expected)


@pytest.mark.parametrize("form", FORMS)
def test_sink_tokens_are_listed_twice_when_the_sink_passes_init_offset(form):
    case = Case(sink_size=60, init_offset=8)
    step = make_step(case)
    sparse_list, _, weight_list, _ = step(form)
    for row, score in zip(
        sparse_list.cpu().reshape(-1, sparse_list.shape[-1]),
        step.exact_scores[:, :, 0].reshape(-1, case.sk),
        strict=True,
    ):
        tokens, times = row.unique(return_counts=True)
        twice = set(tokens[times == 2].tolist())
        best = 8 + int(score[8:60].argmax())
        cut = np.sort(score[8 : case.sk - case.window_size])[-case.heavy_size]
        assert score[best] > cut  # or the case shows nothing
        assert best in twice
        assert twice <= set(range(8, 60))
    check_weights(case, sparse_list, weight_list)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("sink", "window"), [(500, 4), (4, 500), (80, 80)])
def test_tokens_of_both_sink_and_window_are_listed_twice(sink, window, form):
    case = Case(sink_size=sink, window_size=window, init_offset=100, heavy_size=0)
    sparse_list, sparse_len, _, _ = make_step(case)(form)
    tokens = range(case.sk)
    expected = sorted([*tokens[:sink], *tokens[-window:]])
    assert sparse_list[0, 0].tolist() == expected
    assert (sparse_len == len(expected)).all()


@pytest.mark.parametrize("form", FORMS)
def test_which_of_equal_scores_is_taken_is_left_to_topk(form):
    case = Case()
    step = make_step(case)
    step.arguments[0].zero_()
    candidates = torch.zeros(case.b, case.h, 1, case.sk - case.init_offset, device=DEVICE)
    candidates[..., -case.window_size :] = float("-inf")
    heavy = torch.topk(candidates, case.heavy_size).indices[:, :, 0] + case.init_offset
    sparse_list = step(form)[0]
    listed = sparse_list[:, :, case.sink_size : -case.window_size]
    assert torch.equal(listed, heavy.sort().values)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_first_query_tokens_list_is_returned(form):
    several = make_step(Case(sq=3, h=4, distinct=True))
    query, *rest = several.arguments
    first = dataclasses.replace(several, arguments=(query[:, :, :1].contiguous(), *rest))
    last = dataclasses.replace(several, arguments=(query[:, :, 2:].contiguous(), *rest))
    sparse_list, _, weight_list, _ = several(form)
    assert torch.equal(sparse_list, first(form)[0])
    assert not torch.equal(sparse_list, last(form)[0])
    check_weights(several.case, sparse_list, weight_list)


@pytest.mark.parametrize("form", FORMS)
def test_every_query_token_gets_the_window_up_to_the_last_key(form):
    case = Case(sq=3)
    sparse_list = make_step(case)(form)[0]
    window = torch.arange(case.sk - case.window_size, case.sk)
    assert torch.equal(sparse_list[0, 0, -case.window_size :].cpu(), window)


# Codes.


def some_keys(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_codes(keys: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The first centroid of the least squared distance, in float64: [b, h_kv, n, n_subvec]."""
    b, h_kv, n, _ = keys.shape
    n_subvec = centroids.shape[2]
    points = keys.astype(np.float64).reshape(b, h_kv, n, n_subvec, -1)
    codes = np.empty(points.shape[:-1], np.int64)
    for i, k, s, m in np.ndindex(*codes.shape):
        distance = [((points[i, k, s, m] - c) ** 2).sum() for c in centroids[i, k, m]]
        codes[i, k, s, m] = int(np.argmin(distance))
    return codes


@pytest.mark.parametrize("new", [0, 1, 3])
def test_codes_of_new_keys_are_a_naive_argmin_with_ties_to_the_lower_centroid(new):
    generator = torch.Generator().manual_seed(new)
    # Small integers: distances are exact, and many are equal.
    keys = torch.randint(-2, 3, (2, 2, 60, 6), generator=generator).float()
    centroids = torch.randint(-2, 3, (2, 2, 3, 16, 2), generator=generator).float()
    expected = torch.from_numpy(naive_codes(keys[:, :, 4:].numpy(), centroids.numpy()))
    known = expected[:, :, : 56 - new].contiguous()
    arguments = (x.to(DEVICE) for x in (keys, centroids, known))
    codebook = encode.append_codes(*arguments, init_offset=4, phi=None)
    assert torch.equal(codebook.cpu(), expected)


def test_codes_of_random_keys_are_a_naive_argmin():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 90, 16, generator=generator)
    centroids = torch.randn(1, 2, 2, 16, 8, generator=generator)
    none = torch.empty(1, 2, 0, 2, dtype=torch.int64)
    arguments = (x.to(DEVICE) for x in (keys, centroids, none))
    codebook = encode.append_codes(*arguments, init_offset=0, phi=None)
    np.testing.assert_array_equal(
        codebook.cpu().numpy(), naive_codes(keys.numpy(), centroids.numpy())
    )


def test_codes_do_not_depend_on_how_many_tokens_a_product_holds(monkeypatch):
    step = make_step(Case(new=100))
    _, keys, centroids, known = step.arguments
    whole = encode.append_codes(keys, centroids, known, 8, None)
    monkeypatch.setattr(encode, "PRODUCT_ELEMENTS", 7 * centroids.numel())
    assert encode.tokens_a_slice(centroids) == 7
    assert torch.equal(encode.append_codes(keys, centroids, known, 8, None), whole)


def test_codes_grow_step_by_step_as_they_do_at_once():
    case = Case(new=5, metric="ip", sk=200)
    step = make_step(case)
    query, keys, centroids, codebook = step.arguments
    for sk in range(196, 201):
        codebook = ITERATIONS["eager"](query, keys[:, :, :sk], centroids, codebook, **step.options)[
            3
        ]
        assert codebook.shape[2] == sk - case.init_offset
    assert torch.equal(codebook, step("eager")[3])


def test_a_key_longer_than_phi_is_augmented_by_zero():
    points = some_keys(1, 1, 20, 1, 4).to(DEVICE)
    phi = torch.full((1, 1, 1), 4.0, device=DEVICE)
    extra = encode.augment(points, phi)[..., -1]
    longer = points.square().sum(-1) > 4
    assert 0 < int(longer.sum()) < 20
    assert not extra[longer].any()
    on_sphere = extra.square() + points.square().sum(-1)
    torch.testing.assert_close(on_sphere[~longer], torch.full_like(on_sphere[~longer], 4))


# k-means.


def train(keys, **changes):
    options = {"pq_group_factor": 2, "pq_bits": 3, "init_offset": 5} | changes
    return indexer_first(keys.to(DEVICE), **options)


def spread(keys, centroids, codebook, init_offset=5):
    """The mean squared distance of the trained keys from their centroids."""
    n_subvec, _, subvec_d = centroids.shape[2:]
    points = keys[:, :, init_offset:].to(DEVICE).float().unflatten(-1, (n_subvec, -1))
    index = codebook.transpose(2, 3).unsqueeze(-1).expand(-1, -1, -1, -1, subvec_d)
    return float((centroids.gather(3, index).transpose(2, 3) - points).square().mean())


def test_kmeans_codes_name_the_nearest_centroid():
    keys = some_keys(2, 2, 100, 8)
    centroids, codebook, phi = train(keys)
    assert phi is None
    assert centroids.shape == (2, 2, 2, 8, 4)
    np.testing.assert_array_equal(
        codebook.cpu().numpy(), naive_codes(keys[:, :, 5:].numpy(), centroids.cpu().numpy())
    )


def test_kmeans_iterations_bring_centroids_closer():
    keys = some_keys(1, 2, 400, 8)
    spreads = [spread(keys, *train(keys, kmeans_iter=n)[:2]) for n in (0, 1, 3, 10)]
    assert all(later < earlier for earlier, later in itertools.pairwise(spreads))


def test_kmeans_finds_separate_clusters():
    generator = torch.Generator().manual_seed(0)
    centers = 100 * torch.randn(2, 4, generator=generator)
    which = torch.randint(2, (1, 1, 205), generator=generator)
    keys = centers[which] + 0.01 * torch.randn(1, 1, 205, 4, generator=generator)
    centroids, codebook, _ = train(keys, pq_group_factor=1, pq_bits=1)
    assert spread(keys, centroids, codebook) < 2e-4  # the noise's variance is 1e-4


def test_kmeans_repeats_itself_by_seed():
    keys = some_keys(1, 2, 100, 8)
    first, again, other = train(keys), train(keys), train(keys, seed=1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_kmeans_in_slices_gives_the_same_codes(monkeypatch):
    # Small integers: sums are exact in any order.
    keys = torch.randint(-4, 5, (1, 2, 105, 8), generator=torch.Generator().manual_seed(0)).float()
    whole = train(keys, kmeans_iter=1)
    monkeypatch.setattr(encode, "PRODUCT_ELEMENTS", 1000)
    slices = train(keys, kmeans_iter=1)
    assert torch.equal(whole[0], slices[0])
    assert torch.equal(whole[1], slices[1])


def test_kmeans_refills_empty_clusters():
    keys = some_keys(1, 1, 3, 8)[:, :, torch.arange(105) % 3]  # three different keys, C = 8
    centroids, codebook, _ = train(keys)
    assert torch.isfinite(centroids).all()
    # No cluster keeps a mean of nothing: every centroid is one of the keys.
    different = keys[:, :, :3].to(DEVICE).unflatten(-1, (2, 4)).transpose(2, 3)
    distance = (centroids.unsqueeze(-2) - different.unsqueeze(3)).abs().amax(-1)
    assert (distance.amin(-1) < 1e-6).all()
    assert codebook.shape == (1, 1, 100, 2)


@pytest.mark.parametrize(("sk", "different"), [(0, 0), (5, 0), (6, 1), (10, 5), (13, 8)])
def test_kmeans_with_fewer_keys_than_centroids_uses_the_keys(sk, different):
    keys = some_keys(1, 2, sk, 8)
    centroids, codebook, _ = train(keys)
    assert codebook.shape == (1, 2, different, 2)
    if different == 0:
        assert not centroids.any()
    else:
        assert spread(keys, centroids, codebook) == 0
        assert len(centroids[0, 0, 0].unique(dim=0)) == different


def test_kmeans_augments_keys_for_the_inner_product():
    keys = some_keys(2, 2, 100, 8)
    centroids, codebook, phi = train(keys, metric="ip", kmeans_iter=0)
    norms = keys[:, :, 5:].unflatten(-1, (2, 4)).square().sum(-1)
    torch.testing.assert_close(phi.cpu(), norms.amax(2))
    assert centroids.shape == (2, 2, 2, 8, 5)
    # Untrained centroids are keys, and all augmented keys lie on one sphere.
    expected = phi[..., None].expand(-1, -1, -1, 8)
    torch.testing.assert_close(centroids.square().sum(-1), expected)
    assert codebook.shape == (2, 2, 95, 2)


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_trained_index_goes_through_every_form(metric, dtype):
    case = Case(h=4, sk=170, metric=metric, dtype=dtype, centroid_dtype=torch.float32, new=2)
    keys = some_keys(1, 2, 170, 16).to(dtype).to(DEVICE)
    query = some_keys(1, 4, 1, 16, seed=1).to(dtype).to(DEVICE)
    options = {"pq_group_factor": 2, "pq_bits": 4, "init_offset": 8, "metric": metric}
    centroids, codebook, phi = indexer_first(keys[:, :, :168], **options)
    points = encode.subvectors(keys[:, :, 168:], 2)
    points = points if phi is None else encode.augment(points, phi)
    codes = torch.cat([codebook, encode.nearest(points, centroids)], dim=2)
    step = Step(case, (query, keys, centroids, codebook), case.options | {"ip2l2_phi": phi}, codes)
    for form in FORMS:
        check_step(step, step(form))


# Attention over the lists.


def dense_attention(query, keys, values, weights, scale=None):
    """float64 softmax attention where each token's exponential counts `weights` times."""
    query, keys, values = (x.double().cpu().numpy() for x in (query, keys, values))
    group = query.shape[1] // keys.shape[1]
    keys, values = (np.repeat(x, group, axis=1) for x in (keys, values))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * np.einsum("bhqd,bhsd->bhqs", query, keys)
    mass = weights * np.exp(logits - logits.max(-1, keepdims=True))
    total = mass.sum(-1, keepdims=True)
    return np.einsum("bhqs,bhsd->bhqd", mass / np.where(total > 0, total, 1), values)


def attention_arguments(sq=2, dtype=torch.float32):
    query = some_keys(2, 6, sq, 16, seed=1)
    keys, values = some_keys(2, 2, 90, 16, seed=2), some_keys(2, 2, 90, 8, seed=3)
    return tuple(x.to(dtype).to(DEVICE) for x in (query, keys, values))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_over_lists_is_softmax_over_the_listed_tokens(dtype, tolerance, scale):
    arguments = attention_arguments(dtype=dtype)
    order = torch.rand(2, 6, 90, generator=torch.Generator().manual_seed(4)).argsort(-1)
    lengths = torch.tensor([[0, 1, 2, 17, 30, 30], [30, 5, 0, 1, 29, 12]])
    listed = order[..., :30].sort(-1).values
    past = torch.arange(30) >= lengths[..., None]
    weights = torch.zeros(2, 6, 90).scatter_add_(2, listed, (~past).float())
    tail = torch.where(torch.arange(30) % 2 == 0, -1, 10**9)  # never read, so never out of bounds
    listed = torch.where(past, tail, listed)
    found = sparse_attention(*arguments, listed.to(DEVICE), lengths.to(DEVICE), scale=scale)
    expected = dense_attention(*arguments, weights.unsqueeze(2).numpy(), scale)
    assert found.dtype == dtype
    # Rounding the result to dtype, of values around 1; in float32, the sums of 30 terms.
    np.testing.assert_allclose(
        found.double().cpu().numpy(), expected, rtol=tolerance, atol=tolerance
    )
    assert not found[lengths.to(DEVICE) == 0].any()


def test_a_token_that_is_listed_twice_counts_twice():
    arguments = attention_arguments()
    listed = torch.tensor([3, 7, 7, 20]).repeat(2, 6, 1).to(DEVICE)
    weights = np.zeros((2, 6, 1, 90))
    weights[..., [3, 7, 20]] = [1, 2, 1]
    found = sparse_attention(*arguments, listed, torch.full((2, 6), 4, device=DEVICE))
    expected = dense_attention(*arguments, weights)
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=2e-6, atol=2e-6)


def test_attention_over_a_short_context_is_full_attention():
    case = Case(sk=40, h=4)
    step = make_step(case)
    query, keys = step.arguments[:2]
    values = some_keys(1, 2, 40, 16).to(DEVICE)
    sparse_list, sparse_len, _, _ = step("iteration4")
    found = sparse_attention(query, keys, values, sparse_list, sparse_len)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, enable_gqa=True
    )
    torch.testing.assert_close(found, expected)


# Bad input.


def change(position, edit):
    """Edits one of query, keys, pq_centroids and pq_codebook."""

    def edited(arguments, options):
        arguments[position] = edit(arguments[position])

    return edited


def option(**changes):
    return lambda arguments, options: options.update(changes)


BAD_INPUT = {
    "code too large": (
        change(3, lambda x: x.index_fill(2, torch.tensor([7], device=DEVICE), 16)),
        r"pq_codebook: expected codes in \[0, 16\), got codes in \[\d, 16\]; were they made",
    ),
    "negative code": (
        change(3, lambda x: x.index_fill(2, torch.tensor([7], device=DEVICE), -1)),
        r"pq_codebook: expected codes in \[0, 16\), got codes in \[-1, 15\]",
    ),
    "strided query": (
        change(0, lambda x: x.repeat(1, 1, 1, 2)[..., ::2]),
        r"query: expected a contiguous tensor, got strides .*; call .contiguous\(\)",
    ),
    "strided centroids": (
        change(2, lambda x: x.repeat(1, 1, 1, 1, 2)[..., ::2]),
        "pq_centroids: expected a contiguous tensor",
    ),
    "strided codes": (
        change(3, lambda x: x.repeat(1, 1, 1, 2)[..., ::2]),
        "pq_codebook: expected a contiguous tensor",
    ),
    "heads that do not divide": (
        change(0, lambda x: x.repeat(1, 2, 1, 1)[:, :3]),
        "query: expected a multiple of the keys' 2 heads, got 3 heads",
    ),
    "no heads": (change(0, lambda x: x[:, :0]), "query: expected a multiple of the keys' 2 heads"),
    "no query token": (change(0, lambda x: x[:, :, :0]), "query: expected b and sq of at least 1"),
    "query of rank 3": (
        change(0, lambda x: x[:, :, 0]),
        r"query: expected \[b, h, sq, d\], got shape \[1, 2, 16\]; reshape it to 4 axes",
    ),
    "query of float64": (
        change(0, torch.Tensor.double),
        "query: expected float32 or bfloat16 or float16, got float64; cast with",
    ),
    "numpy query": (
        change(0, lambda x: x.cpu().numpy()),
        "query: expected a float32 .* tensor .*, got ndarray; pass a torch.Tensor",
    ),
    "keys of another width": (
        change(1, lambda x: x[..., :8]),
        r"keys: expected \[b, h_kv, sk, d\] = \[1, 2, 150, 16\], got \[1, 2, 150, 8\]",
    ),
    "keys of another batch": (change(1, lambda x: x.repeat(2, 1, 1, 1)), "keys: expected"),
    "integer keys": (change(1, torch.Tensor.long), "keys: expected float32 .*, got int64"),
    "fewer keys than codes": (
        change(1, lambda x: x[:, :, :148]),
        r"pq_codebook: expected codes of at most 140 tokens \(sk - init_offset\), got 141",
    ),
    "subspaces that do not divide": (
        change(2, lambda x: x[:, :, [0, 1, 0]]),
        "pq_centroids: expected n_subvec that divides d, .*; choose subspaces that divide d=16",
    ),
    "centroids of another width": (
        change(2, lambda x: x[..., :7].contiguous()),
        r"pq_centroids: expected .* = \[1, 2, 2, 16, 8\], got \[1, 2, 2, 16, 7\]",
    ),
    "centroids of other heads": (change(2, lambda x: x[:, :1]), "pq_centroids: expected"),
    "codes of int32": (
        change(3, torch.Tensor.int),
        r"pq_codebook: expected int64, got int32; cast with .to\(torch.int64\)",
    ),
    "codes of other heads": (change(3, lambda x: x[:, :1]), "pq_codebook: expected"),
    "codes of other subspaces": (change(3, lambda x: x[..., :1].contiguous()), "pq_codebook: exp"),
    "another device": (
        change(1, lambda x: x.to("meta")),
        f"keys: expected a tensor on {DEVICE}.*, got meta; move it there",
    ),
    "negative size": (option(heavy_size=-1), "heavy_size: expected an int of at least 0, got -1"),
    "fractional size": (option(window_size=1.5), "window_size: expected an int .*, got 1.5"),
    "boolean size": (option(sink_size=True), "sink_size: expected an int .*, got True"),
    "negative init_offset": (option(init_offset=-8), "init_offset: expected an int"),
    "unknown metric": (option(metric="cosine"), "metric: expected 'euclidean' or 'ip', got"),
    "inner product of plain centroids": (
        option(metric="ip"),
        "pq_centroids: expected .*'ip' has one more dimension",
    ),
    "phi of the euclidean metric": (
        option(ip2l2_phi=torch.zeros(1, 2, 2)),
        "ip2l2_phi: expected None for metric='euclidean', got a tensor; pass metric='ip'",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_by_name(name):
    edit, message = BAD_INPUT[name]
    step = make_step(Case())
    arguments, options = list(step.arguments), dict(step.options)
    edit(arguments, options)
    for form in ("eager", "iteration4"):
        with pytest.raises(ValueError, match=message):
            ITERATIONS[form](*arguments, **options)


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        (None, r"ip2l2_phi: expected a float32 tensor \[b, h_kv, n_subvec\], got NoneType"),
        (torch.zeros(1, 2, 3), r"ip2l2_phi: expected .* = \[1, 2, 2\], got \[1, 2, 3\]"),
        (torch.zeros(1, 2), r"ip2l2_phi: expected \[b, h_kv, n_subvec\], got shape \[1, 2\]"),
        (torch.zeros(1, 2, 2).double(), "ip2l2_phi: expected float32, got float64"),
    ],
)
def test_a_bad_phi_is_refused(phi, message):
    step = make_step(Case(metric="ip"))
    with pytest.raises(ValueError, match=message):
        step("iteration1", ip2l2_phi=phi)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pq_group_factor": 3}, "pq_group_factor: expected subspaces that divide d, got 3"),
        ({"pq_group_factor": 0}, "pq_group_factor: expected an int of at least 1, got 0"),
        ({"pq_bits": 0}, "pq_bits: expected an int of at least 1, got 0"),
        ({"kmeans_iter": -1}, "kmeans_iter: expected an int of at least 0, got -1"),
        ({"init_offset": 0.5}, "init_offset: expected an int of at least 0, got 0.5"),
        ({"metric": "l2"}, "metric: expected 'euclidean' or 'ip', got 'l2'"),
    ],
)
def test_bad_training_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        train(some_keys(1, 2, 50, 8), **changes)


def test_training_without_a_head_is_refused():
    with pytest.raises(ValueError, match="keys: expected b and h_kv of at least 1, got"):
        train(some_keys(1, 0, 50, 8))


@pytest.mark.parametrize(
    ("position", "edit", "message"),
    [
        (0, lambda x: x[:, :3], "query: expected a multiple of the keys' 2 heads, got 3"),
        (1, lambda x: x[..., :8], "keys: expected"),
        (2, lambda x: x[:, :, :50], "values: expected .* the keys"),
        (3, lambda x: x[:, :2], "sparse_list: expected"),
        (3, lambda x: x.float(), "sparse_list: expected int64 or int32, got float32"),
        (4, lambda x: x[:, :2], "sparse_len: expected"),
    ],
)
def test_bad_attention_input_is_refused(position, edit, message):
    listed = torch.zeros(2, 6, 4, dtype=torch.int64, device=DEVICE)
    lengths = torch.full((2, 6), 4, device=DEVICE)
    arguments = [*attention_arguments(), listed, lengths]
    arguments[position] = edit(arguments[position])
    with pytest.raises(ValueError, match=message):
        sparse_attention(*arguments)


def test_reduced_precision_products_are_refused():
    step = make_step(Case())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match="float32 matmul precision: expected full float32"):
            step("eager")
        check_step(step, step("iteration4"))  # multiplies in its own kernel
    finally:
        torch.set_float32_matmul_precision(before)


def test_capture_names_the_forms_it_knows():
    with pytest.raises(ValueError, match=r"expected one of \['eager', 'iteration1'.*got 'iter'"):
        capture("iter", *make_step(Case()).arguments)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is there")
def test_capture_needs_a_gpu():
    step = make_step(Case())
    with pytest.raises(RuntimeError, match="CUDA graphs need an NVIDIA GPU"):
        capture("eager", *step.arguments, **step.options)


# What timing relies on.


class ReadBacks(TorchDispatchMode):
    """Counts the operators that bring a tensor's value to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [Case(metric="ip"), Case(sk=30)], ids=["ip", "short"])
def test_without_value_checks_no_value_is_read_back(case, form):
    step = make_step(case)
    with ReadBacks() as checked:
        step(form)
    assert checked.count > 0  # or the mode sees nothing
    with ReadBacks() as unchecked:
        step(form, check_values=False)
    assert unchecked.count == 0


def compile_every_kernel():
    """Compiles the kernels with every tuning configuration; needs TRITON_INTERPRET=0, no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sizes = {"N_SUBVEC": 2, "SUBVEC_D": 48, "CENT_CNT": 64, "CENTROID_D": 49}
    lists = {"NUM_QUERIES": 1, "SINK": 128, "HEAVY": 128, "WINDOW": 128, "INIT_OFFSET": 128}
    kernels = [
        (iteration1.pq_score_kernel_v1, 4, sizes | {"QUERIES_A_KV": 4, "BLOCK_KEYS": 128}),
        (iteration4.generate_sparse_indices_kernel, 4, lists),
    ]
    for tuned, others in (
        (iteration2.pq_score_kernel_v2, {"NUM_QUERIES": 1, "GROUP": 4}),
        (iteration3.pq_score_kernel_v3, {"QUERIES_A_KV": 4}),
    ):
        for config in tuned.configs:
            kernels.append((tuned.fn, config.num_warps, sizes | others | config.kwargs))
    for kernel, num_warps, constants in kernels:
        dtype = "bf16" if num_warps == 4 else "fp32"
        types = dict.fromkeys(("query", "centroids", "weight_list"), f"*{dtype}")
        types |= dict.fromkeys(("codebook", "top", "sparse_list"), "*i64") | {"scores": "*fp32"}
        types |= dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        h100 = GPUTarget("cuda", 90, 32)
        assert triton.compile(source, target=h100, options={"num_warps": num_warps}).asm["cubin"]


@pytest.mark.skipif(DEVICE == "cuda", reason="the other tests compile and run the kernels")
def test_every_kernel_compiles_for_an_h100(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import *; compile_every_kernel()"],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is there")
def test_importing_triton_first_without_a_gpu_says_what_to_do():
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", "import triton, torch_reference"],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "ImportError: torch_reference: without a GPU" in run.stderr


def test_public_names():
    assert set(torch_reference.__all__) >= {
        "ITERATIONS",
        "indexer_first",
        "sparse_attention",
        "capture",
    }
    assert FORMS == ["eager", "iteration1", "iteration2", "iteration3", "iteration4"]
