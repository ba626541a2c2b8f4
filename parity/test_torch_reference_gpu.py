"""The PyTorch/Triton original on a GPU: compiled and tuned kernels, CUDA graphs, no waiting."""

import dataclasses
import random

import pytest
import torch

from parity.test_torch_reference import FORMS, Case, check_step, make_step
from torch_reference import ITERATIONS, capture

pytestmark = pytest.mark.gpu

# Each shape is compiled and tuned for once; the draws below vary what needs neither.
SHAPES = {
    "seed": Case(h=32, h_kv=32, d=128, bits=6),
    "grouped queries": Case(b=2, h=32, h_kv=8, d=128, bits=6, dtype=torch.bfloat16),
    "batch rows": Case(b=5, h=4, h_kv=2, d=64, bits=6),
    "inner product": Case(b=2, h=8, h_kv=2, d=128, bits=6, metric="ip"),
    "fine": Case(h=8, h_kv=2, d=128, n_subvec=16, bits=8),
    "several query tokens": Case(h=8, h_kv=4, sq=3, d=64, bits=6),
    "float16": Case(h=6, h_kv=2, d=96, n_subvec=3, bits=5, dtype=torch.float16),
    "one query head a row": Case(b=7, h=1, h_kv=1, d=32, bits=4, metric="ip"),
}
# (sink, window, heavy, init_offset): the list kernel is compiled for each.
SIZES = [(128, 128, 128, 128), (4, 60, 500, 4), (0, 17, 64, 30), (32, 0, 1, 32), (16, 16, 0, 20)]
DRAWS = 26


def draw(shape: Case, number: int) -> Case:
    """A case of this shape: the first 32000 keys long, others short, barely not, or up to 4000."""
    generator = random.Random(number)
    sink, window, heavy, init_offset = generator.choice(SIZES)
    # A longer window could use up the candidates: another test's oddity.
    window = min(window, 2**shape.bits + shape.sq)
    short = heavy + init_offset + shape.sq + 2**shape.bits
    longer = [generator.randint(short, 4000) for _ in range(4)]
    sk = generator.choice([short, short + 1, *longer]) if number else 32000
    return dataclasses.replace(
        shape,
        sk=max(sk, sink),
        sink_size=sink,
        window_size=window,
        heavy_size=heavy,
        init_offset=init_offset,
        new=generator.choice([0, 1, 1, 3]),
    )


@pytest.mark.parametrize("number", range(DRAWS))
@pytest.mark.parametrize("name", SHAPES)
def test_every_form_selects_what_the_scores_decide(name, number):
    step = make_step(draw(SHAPES[name], number), seed=number)
    for form in FORMS:
        check_step(step, step(form))


@pytest.mark.parametrize("metric", ["euclidean", "ip"])
def test_without_ties_every_iteration_returns_what_eager_does(metric):
    case = draw(SHAPES["grouped queries"], 0)
    step = make_step(dataclasses.replace(case, sk=4000, metric=metric, distinct=True))
    expected = step("eager")
    for form in FORMS[1:]:
        for one, other in zip(expected, step(form), strict=True):
            assert torch.equal(one, other)


GRAPH_CASES = {
    "seed": Case(h=32, h_kv=32, d=128, bits=6, sk=4000, distinct=True),
    "grouped queries": dataclasses.replace(
        SHAPES["grouped queries"], sk=3000, new=2, distinct=True
    ),
    "inner product": dataclasses.replace(SHAPES["inner product"], sk=3000, distinct=True),
    "short context": Case(h=4, sk=30),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GRAPH_CASES)
def test_a_replay_equals_a_direct_call_after_inputs_change_in_place(name, form):
    first, *later = (make_step(GRAPH_CASES[name], seed) for seed in range(4))
    recording = capture(form, *first.arguments, **first.options)
    torch.cuda.synchronize()
    check_step(first, recording.outputs)
    for step in later:
        for static, new in zip(first.arguments, step.arguments, strict=True):
            static.copy_(new)
        if "ip2l2_phi" in step.options:
            first.options["ip2l2_phi"].copy_(step.options["ip2l2_phi"])
        outputs = recording.replay()
        torch.cuda.synchronize()
        check_step(step, outputs)
        direct = ITERATIONS[form](*step.arguments, **step.options)
        for one, other in zip(outputs, direct, strict=True):
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [SHAPES["inner product"], Case(sk=30)], ids=["long", "short"])
def test_without_value_checks_nothing_waits_for_the_device(case, form):
    step = make_step(dataclasses.replace(case, new=3))
    step(form, check_values=False)  # compiles and tunes, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(form, check_values=False)
        with pytest.raises(RuntimeError, match="synchroniz"):
            step(form)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_growing_context_is_neither_tuned_nor_compiled_again(form, monkeypatch):
    case = Case(h=32, h_kv=8, d=128, bits=6, sk=4000)
    make_step(case)(form)
    # Not at the top: without a GPU, torch_reference must be imported before triton.
    from triton import knobs

    compilations = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **info: compilations.append(info)
    )
    for sk in range(4001, 4034):
        make_step(dataclasses.replace(case, sk=sk))(form)
    assert compilations == []
    # Or the hook sees nothing. Iterations 3 and 4 share a kernel: each form has a size of its own.
    make_step(dataclasses.replace(case, d=144 + 16 * FORMS.index(form)))(form)
    assert compilations


@pytest.mark.parametrize("form", FORMS[1:])
def test_kernels_refuse_what_lies_on_the_host(form):
    step = make_step(Case())
    on_host = [x.cpu() for x in step.arguments]
    with pytest.raises(ValueError, match="query: expected a CUDA tensor, got cpu"):
        ITERATIONS[form](*on_host, **step.options)
    check_step(
        dataclasses.replace(step, codes=step.codes.cpu()),
        ITERATIONS["eager"](*on_host, **step.options),
    )


@pytest.mark.parametrize("form", FORMS)
def test_repeated_calls_return_the_same_bits(form):
    step = make_step(dataclasses.replace(SHAPES["grouped queries"], sk=20000))
    first = step(form)
    for _ in range(20):
        for one, other in zip(first, step(form), strict=True):
            assert torch.equal(one, other)
