"""The benchmark program on a CPU: arithmetic, refusals, and whole runs on tiny workloads."""

import argparse
import dataclasses
import functools
import json
import re
import shlex
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    agreement,
    build,
    ceilings,
    choice,
    clock,
    decode,
    implementations,
    machine,
    measure,
    plots,
    programs,
    quality,
    report,
    run,
    stages,
    tables,
)
from benchmarks.__main__ import main
from benchmarks.clock import ClockError, Kernel
from benchmarks.programs import Forms
from jax_indexer import cells, state
from jax_indexer.kernels import backend
from parity import real_keys
from parity.inputs import SMALL, WORKLOADS, make_inputs
from parity.quality import Layers

CEILINGS = ceilings.Ceilings(
    copy_bytes_per_second=3e12,
    lookups_per_second={"float32": 1e12, "bfloat16": 2e12, "float16": 2e12},
    kernel_us=1.5,
    dispatch_us=5.0,
    dispatch_profiled_us=6.0,
)


PARITY = Path(__file__).parent
ROOT = PARITY.parent


@pytest.mark.parametrize(
    ("folder", "never", "excepted"),
    [
        (PARITY, "benchmarks", ("test_benchmarks.py", "test_quality.py", "test_readme.py")),
        (ROOT / "jax_indexer", "benchmarks|parity|torch_reference|torch", ()),
        (ROOT / "torch_reference", "benchmarks|parity|jax_indexer|jax", ()),
    ],
    ids=["parity", "jax_indexer", "torch_reference"],
)
def test_an_import_goes_one_way(folder, never, excepted):
    for path in folder.rglob("*.py"):
        found = re.findall(rf"^ *(?:from|import) (?:{never})\b.*", path.read_text(), re.MULTILINE)
        assert not found or path.name in excepted, (path, found)


# Arithmetic


def test_statistics_of_samples():
    found = clock.summary([4.0, 1.0, 3.0, 2.0, 10.0])
    assert found == {
        "count": 5,
        "min": 1.0,
        "p20": pytest.approx(1.8),  # four fifths of the way from the lowest to the next
        "median": 3.0,
        "p80": pytest.approx(5.2),  # a fifth of the way from 4 to 10
        "p99": pytest.approx(9.76),
        "max": 10.0,
        "mean": 4.0,
        "std": pytest.approx(10**0.5),
    }


def test_work_of_the_seed_workload_by_hand():
    work = ceilings.step_work(WORKLOADS["seed"])
    candidates = 32000 - 128 - 128
    codes = 32 * 2 * candidates
    codebooks = 32 * 2 * 64 * 64 * 4
    query_and_key = (32 + 32) * 128 * 4
    lists_and_counts = 32 * (384 + 1) * 4
    weights = 32 * 32000 * 4
    new_codes_and_lengths = 32 * 2 + 2 * 4
    assert work.lookups == 32 * 2 * candidates == 2031616
    assert work.bytes == (
        codes + codebooks + query_and_key + lists_and_counts + weights + new_codes_and_lengths
    )
    assert work.bytes == 7258312


def test_floor_is_the_slower_of_bytes_and_lookups_and_a_launch():
    seed = ceilings.floor(ceilings.step_work(WORKLOADS["seed"]), CEILINGS)
    assert seed["bytes_us"] == pytest.approx(7258312 / 3e6)
    assert seed["lookups_us"] == pytest.approx(2.031616)
    assert seed["us"] == pytest.approx(7258312 / 3e6 + 1.5)
    # Four query heads share 16 codes a token here: look-ups take longer than bytes.
    fine = ceilings.floor(ceilings.step_work(WORKLOADS["fine-128k-b4"]), CEILINGS)
    assert fine["lookups_us"] == pytest.approx(4 * 32 * 16 * (131072 - 256) / 1e6)
    assert fine["us"] == pytest.approx(fine["lookups_us"] + 1.5)
    # Entries of half the bytes come faster.
    half = ceilings.floor(ceilings.step_work(WORKLOADS["fine-128k-b4-bf16"]), CEILINGS)
    assert half["lookups_us"] == pytest.approx(fine["lookups_us"] / 2)


def test_rows_that_are_selected_whole_need_no_codes():
    workload = SMALL["small-short"]  # lengths 1, 30 and 33; up to 12 + 5 + 1 + 16 all is selected
    assert ceilings.scored_tokens(workload) == [0, 0, 0]
    longer = dataclasses.replace(workload, L=(1, 34, 35))
    assert ceilings.scored_tokens(longer) == [0, 0, 35 - 7 - 5]


def test_lookup_kernel_sums_the_rows_it_claims_to_read():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, ceilings.CENTROIDS, 2 * ceilings.LOOKUP_BLOCK, np.int32)
    table = rng.integers(-8, 8, (ceilings.SUBSPACES * ceilings.CENTROIDS, 4)).astype(np.float32)
    with backend.interpreted():
        found = ceilings.sum_of_lookups(jnp.asarray(table), jnp.asarray(codes), lookups=5)
    rows = [m * ceilings.CENTROIDS + (codes + 37 * m) % ceilings.CENTROIDS for m in range(5)]
    np.testing.assert_array_equal(found, sum(table[row].sum(axis=1) for row in rows))


# The clock


def test_kernels_belong_to_the_stream_between_whose_marks_they_run():
    mark = [Kernel("mark", start, 1.0) for start in (10.0, 20.0, 30.0, 40.0)]
    between = [Kernel("other", 5.0, 1.0), Kernel("other", 25.0, 1.0)]
    first = [Kernel("a", 12.0, 2.0), Kernel("b", 15.0, 3.0)]
    second = [Kernel("a", 33.0, 2.0)]
    found = clock.between_marks([*second, *mark, *first, *between], "mark", 2)
    assert found == [first, second]


def test_a_lost_mark_is_an_error():
    with pytest.raises(ClockError, match=r"expected 4 marks .* got 3"):
        clock.between_marks([Kernel("mark", float(i), 1.0) for i in range(3)], "mark", 2)


def kernels_named(names):
    return [Kernel(name, float(i), 1.0) for i, name in enumerate(names)]


def test_a_stream_is_cut_by_the_number_of_kernels_and_its_lead_is_dropped():
    assert clock.LEAD == 3
    found = clock.cut(kernels_named("ababab" + "cdef"), 2, cold=False)
    assert [[kernel.name for kernel in call] for call in found] == [["c", "d"], ["e", "f"]]


def test_the_flush_before_a_call_is_no_part_of_it():
    found = clock.cut(kernels_named("fabfabfab" + "fcdfgh"), 2, cold=True)
    assert [[kernel.name for kernel in call] for call in found] == [["c", "d"], ["g", "h"]]
    with pytest.raises(ClockError, match="begin with the kernel that flushes"):
        clock.cut(kernels_named("fabfabfab" + "fcdcfd"), 2, cold=True)


@pytest.mark.parametrize(("names", "cold"), [("ab" * 5 + "a", False), ("", False), ("f" * 5, True)])
def test_a_stream_that_lost_kernels_is_an_error(names, cold):
    with pytest.raises(ClockError, match="expected the same number for each, and at least one"):
        clock.cut(kernels_named(names), 2, cold=cold)


def test_torch_records_give_what_ran_on_the_device(monkeypatch):
    torch = pytest.importorskip("torch")
    on_device, on_host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    class Event:
        def __init__(self, *values):
            self.values = values

        def name(self):
            return self.values[0]

        def start_ns(self):
            return self.values[1]

        def duration_ns(self):
            return self.values[2]

        def device_type(self):
            return self.values[3]

    events = [
        Event("k", 1000, 2500, on_device),
        Event("Memcpy DtoD", 4000, 1000, on_device),
        Event("cudaLaunchKernel", 0, 9000, on_host),
    ]

    class Profile:
        def __init__(self, activities):
            self.profiler = self.kineto_results = self
            self.events = lambda: events

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    ran = []
    found = clock.record_with_torch(lambda: ran.append(1))
    assert ran == [1]
    assert found == [Kernel("k", 0.0, 2.5), Kernel("Memcpy DtoD", 3.0, 1.0)]


def test_torch_keeps_the_records_that_are_read():
    """Of a real profiler, whose records on a CPU have the same methods."""
    pytest.importorskip("torch_reference")  # before the profiler imports Triton
    torch = pytest.importorskip("torch")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(3)
    event = profiler.profiler.kineto_results.events()[0]
    assert event.name()
    assert event.duration_ns() >= 0
    assert event.start_ns() > 0
    assert event.device_type() == torch.autograd.DeviceType.CPU


def test_a_profiler_that_sees_no_kernels_is_refused():
    with pytest.raises(ClockError, match=r"jax\.profiler.*recorded \[\] where JAX ran one"):
        clock.open_kernel_clock("jax.profiler")


def test_torch_kernels_are_grouped_by_stage_and_a_sort_after_top_k_is_part_of_it():
    stage_of = {
        "pq_score_kernel_v3": "score",
        "void at::native::_scatter_gather_elementwise_kernel<128, 8, "
        "at::native::_cuda_scatter_gather_internal_kernel<false, float>::operator()>": "score",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor>": "other",
        "void at::native::mbtopk::radixFindKthValues<float, unsigned int>(...)": "top-k",
        "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(...)": "top-k",
        "void at::native::bitonicSortKVInPlace<2, -1, 16, 16, float, long>(...)": "top-k",
        "generate_sparse_indices_kernel": "index generation",
        "void at::native::_scatter_gather_elementwise_kernel<128, 8, "
        "at::native::_cuda_scatter_fill_internal_kernel<float>::operator()>": "index generation",
        "void at::native::radixSortKVInPlace<2, -1, 128, 32, long, long>(...)": "sort",
        "Memcpy DtoD (Device -> Device)": "other",
    }
    kernels = [Kernel(name, float(i), 1.0) for i, name in enumerate(stage_of)]
    assert stages.groups_of(kernels, "torch") == list(stage_of.values())


def test_our_kernels_are_grouped_by_stage_and_whatever_xla_adds_is_other():
    stage_of = {
        "append_kernel_and_lookup_table_kernel": "append, look-up table",
        "lookup_table_kernel": "append, look-up table",
        "group_maxima_kernel": "group maxima",
        "append_kernel_and_lookup_table_kernel_and_seal_kernel": "append, look-up table",
        "cells_select_kernel": "cells select",
        "threshold_select_kernel": "threshold select",
        "score_kernel": "scores",
        "count_kernel": "sparse index",
        "verify_cut_kernel": "sparse index",
        "sparse_index_kernel": "sparse index",
        "raft::matrix::detail::select::warpsort::block_kernel": "top-k",
        "void cub::DeviceSegmentedRadixSortKernel<float, 4>(float*)": "top-k",
        "loop_add_fusion_2": "other",
    }
    assert stages.groups_of(kernels_named(stage_of), "jax") == list(stage_of.values())
    assert stages.short_name("loop_add_fusion_2") == "loop_add_fusion"


@pytest.mark.parametrize("path", sorted((report.ROOT / "jax_indexer/kernels").glob("*.py")))
def test_every_kernel_of_ours_has_a_stage(path):
    names = re.findall(r"^def (\w+_kernel)\(", path.read_text(), flags=re.MULTILINE)
    assert "other" not in stages.groups_of(kernels_named(names), "jax")


def test_breakdown_adds_the_launches_of_a_call():
    calls = [[Kernel("a", 0.0, 1.0), Kernel("a", 1.0, 2.0), Kernel("b", 3.0, 5.0)]] * 3
    assert stages.breakdown(calls, "jax") == [
        {"group": "other", "kernel": "b", "launches": 1.0, "us": 5.0},
        {"group": "other", "kernel": "a", "launches": 2.0, "us": 3.0},
    ]


# Runs


HAS_GPU = machine.has_gpu


@pytest.fixture(autouse=True, scope="module")
def without_gpu():
    """Runs are those of a CPU everywhere, with chains that compile quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "has_gpu", lambda: False)
        patch.setattr(implementations, "CHAIN_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "small.json"
    argv = ["--quick", "--workload", "small", "--output", str(output)]
    status = main(["run", *argv, "--commit", "abc123-dirty"])
    return status, output


def rows_of(output):
    return json.loads(output.read_text())["rows"]


def test_a_run_without_a_gpu_times_xla_and_eager_torch_by_the_wall_clock(small_run):
    status, output = small_run
    results = json.loads(output.read_text())
    assert status == 0
    assert [(row["workload"], row["implementation"], row["status"]) for row in results["rows"]] == [
        ("small", "jax:xla", "ok"),
        ("small", "torch:eager", "ok"),
    ]
    for row in results["rows"]:
        assert row["call"]["count"] == 8
        assert 0 < row["call"]["min"] <= row["call"]["median"] <= row["call"]["max"]
        assert row["amortised_calls"] == 20
        assert row["compile_seconds"] > 0
        assert "warm" not in row
    xla = results["rows"][0]
    assert xla["in_jit"]["steps"] == 2
    assert results["seconds_by_phase"]["all"]["compiling"] > 0
    assert results["commit"] == "abc123"
    assert results["dirty"] is True
    assert results["machine"]["device"].startswith("CPU: ")
    assert results["ceilings"] is None
    assert results["command"] == "python -m benchmarks run --quick --workload small"


def test_a_run_says_that_there_is_no_gpu(tmp_path, capsys):
    output = tmp_path / "r.json"
    argv = ["run", "--quick", "--workload", "small", "--output", str(output)]
    assert main([*argv, "--implementation", "jax:top_k", "torch:iteration4-graph"]) == 1
    assert "No NVIDIA GPU" in capsys.readouterr().out
    assert [(r["status"], r["reason"]) for r in rows_of(output)] == [
        ("skipped", "needs an NVIDIA GPU")
    ] * 2


@pytest.mark.parametrize(
    ("flag", "known"),
    [("--workload", WORKLOADS), ("--implementation", implementations.IMPLEMENTATIONS)],
)
def test_an_unknown_name_lists_the_known_ones(flag, known, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", flag, "nonsense"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in [*known, "nonsense"])


def test_sizes_that_contradict_each_other_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--workload", "ragged", "--B", "3"])
    assert "L: expected one number or 3, got 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--L", "0"], "L: expected at least the step's own 1, got 0"),
        (["--L", "300", "--S", "200"], "L: expected numbers in 0..S=200, got 300"),
        (["--L", "-1", "--S", "9"], "L: expected numbers in 0..S=9, got -1"),
        (["--K", "0"], "K: expected at least 1, got 0"),
        (["--B", "-1"], "L: expected one number or -1"),
        (["--S", "0"], "S: expected at least 1, got 0"),
        (["--bits", "9"], "num_bits: expected an integer in 1..8, got 9"),
        (["--sweep", "length", "--L", "1000"], "--L: expected nothing, since the sweep of length"),
        (["--sweep", "--bits", "4"], "--bits: expected nothing, since the sweep of subspaces"),
        (["--out", "x.json"], "unrecognized arguments: --out"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_usage_ends_before_anything_is_measured(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--workload", "small", *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", ".", "file/in-a-file.json"])
def test_an_output_that_cannot_be_written_is_found_first(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    keys = tmp_path / quality_layers(tmp_path)
    for program, argv in (
        (main, ["run", "--workload", "small"]),
        (build.main, ["--workload", "seed", "--tokens", "512"]),
        (quality.main, ["--real-keys", str(keys)]),
    ):
        with pytest.raises(SystemExit) as stopped:
            program([*argv, "--output", name])
        assert stopped.value.code == 2
        assert "--output: expected a file that can be written, got" in capsys.readouterr().err


def quality_layers(folder):
    """A folder with a file that the quality program reads."""
    arrays = {
        f"layer{layer}_{name}": np.zeros((4, 1, 8), np.float16)
        for layer in real_keys.LAYERS
        for name in Layers._fields
    }
    np.savez(folder / "smollm2_8k.npz", **arrays)
    return folder


@pytest.mark.parametrize("content", [b"", b"PK no zip", b"nothing"])
def test_keys_that_cannot_be_read_are_named(content, tmp_path, capsys):
    (tmp_path / "smollm2_8k.npz").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        quality.main(["--real-keys", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--real-keys: " in capsys.readouterr().err


def test_a_workload_that_does_not_fit_is_skipped_with_the_reason(tmp_path, capsys):
    output = tmp_path / "r.json"
    size = str(2**45)
    argv = ["run", "--quick", "--workload", "small", "--S", size, "--L", size]
    assert main([*argv, "--output", str(output)]) == 1  # nothing was measured
    for row in rows_of(output):
        assert row["status"] == "skipped"
        assert "GiB or more" in row["reason"]
    results = tables.load([output])
    assert "GiB or more" in report.section(results, [])
    assert "GiB or more" in capsys.readouterr().out


def test_what_the_original_cannot_do_is_skipped_with_the_reason(tmp_path):
    output = tmp_path / "r.json"
    argv = ["run", "--quick", "--workload", "small-three-queries", "--output", str(output)]
    assert main([*argv, "--L", "200", "--implementation", "torch:eager"]) == 1
    assert [(row["status"], row["reason"]) for row in rows_of(output)] == [
        ("skipped", "the original returns the list of the first query token only")
    ]


class WrongStep(implementations.JaxStep):
    """Lists one token that it should not, in the last batch row."""

    def call(self):
        super().call()
        indices = self._selection.indices
        worst = jnp.where(indices[-1, 0, 2] == 5, 6, indices[-1, 0, 2])
        changed = indices.at[-1, 0, 2].set(jnp.where(jnp.arange(worst.size) == 5, 150, worst))
        self._selection = dataclasses.replace(self._selection, indices=changed)


class BrokenStep(implementations.JaxStep):
    def __init__(self, *_, **__):
        raise RuntimeError("a kernel that does not compile\nand its long log")


def test_a_wrong_output_fails_the_run_and_spares_the_other_rows(tmp_path, monkeypatch, capsys):
    for name, step in (("wrong", WrongStep), ("broken", BrokenStep)):
        known = implementations.IMPLEMENTATIONS["jax:xla"]
        changed = dataclasses.replace(known, name=f"jax:{name}", build=step)
        monkeypatch.setitem(implementations.IMPLEMENTATIONS, changed.name, changed)
    output = tmp_path / "r.json"
    argv = ["run", "--quick", "--workload", "small", "--output", str(output), "--implementation"]
    assert main([*argv, "jax:wrong", "jax:broken", "torch:eager"]) == 1
    wrong, broken, good = rows_of(output)
    assert wrong["status"] == "failed"
    assert wrong["reason"].startswith("wrong output: batch row 1, query token 0, head 2: ")
    assert broken["status"] == "failed"
    assert broken["reason"] == "building: RuntimeError: a kernel that does not compile"
    assert good["status"] == "ok"
    assert good["call"]["median"] > 0
    printed = capsys.readouterr().out
    assert "python -m benchmarks run --workload small --implementation jax:wrong --quick" in printed
    assert "2 failed" in printed


def test_top_k_alone_is_checked_and_timed(tmp_path):
    output = tmp_path / "r.json"
    argv = ["run", "--quick", "--workload", "small-grouped", "--output", str(output)]
    assert main([*argv, "--implementation", "jax.lax.top_k", "torch.topk"]) == 0
    assert [row["status"] for row in rows_of(output)] == ["ok", "ok"]
    assert all(row["peer"] for row in rows_of(output))


def test_top_k_check_rejects_a_value_that_is_not_among_the_largest():
    scores = np.float32([[1, 5, 3, 4], [2, 2, 2, 9]])
    values, indices = np.float32([[5, 4], [9, 2]]), np.array([[1, 3], [3, 0]])
    agreement.check_top_k(scores, values, indices)
    with pytest.raises(AssertionError, match="row 0: values differ"):
        agreement.check_top_k(scores, np.float32([[5, 3], [9, 2]]), np.array([[1, 2], [3, 0]]))
    with pytest.raises(AssertionError, match="row 1: positions"):
        agreement.check_top_k(
            scores,
            np.float32([[5, 4], [9, 9]])[:, ::-1] * [[1, 1], [1, 2 / 9]],
            np.array([[3, 1], [3, 3]]),
        )


def test_weights_that_do_not_match_the_list_are_rejected():
    workload = SMALL["small"]
    reference = agreement.Reference(workload, make_inputs(workload))
    with programs.compilers() as pool:
        compiled = implementations.IMPLEMENTATIONS["jax:xla"].programs(workload, Forms(pool))
    step = implementations.JaxStep(reference, compiled)
    step.call()
    step.check(reference)
    weights = step._selection.weights.at[0, 0, 1, 0].set(0)
    step._selection = dataclasses.replace(step._selection, weights=weights)
    with pytest.raises(AssertionError, match=r"head 1: weight 0\.0 at token 0, which the list has"):
        step.check(reference)


def parsed(words):
    parser = argparse.ArgumentParser()
    choice.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words",
    [
        "--workload seed --L 64000 --no-weights --heavy 512 --dtype bfloat16",
        "--workload small-short --L 20 40 60 --bits 3 --table-dtype float16",
        "--workload small --scores equal --quick --clock jax.profiler",
        "--sweep length",
        "--sweep subspaces --workload million",
    ],
)
def test_a_row_is_repeated_by_its_command(words):
    arguments = parsed(words.split())
    for point in choice.chosen_points(arguments):
        jax_xla = implementations.IMPLEMENTATIONS["jax:xla"]
        row = measure.Row(point.workload, jax_xla, choice.timing_flags(arguments))
        python, module, name, command, *again = shlex.split(row.command)
        assert (python, module, name, command) == ("python", "-m", "benchmarks", "run")
        again = parsed(again)
        assert [found.workload for found in choice.chosen_points(again)] == [point.workload]
        assert (again.quick, again.clock) == (arguments.quick, arguments.clock)


def test_sweeps_cover_what_they_are_named_for():
    points = choice.chosen_points(parsed(["--sweep"]))
    of = {name: [p.workload for p in points if p.sweep == name] for name in choice.SWEEPS}
    assert [w.L for w in of["length"]] == [2**n for n in range(12, 21)]
    assert [w.B for w in of["batch"]] == [1, 2, 4, 8, 16, 32, 64]
    fine = of["subspaces"][-1].config
    assert (fine.num_subspaces, fine.num_bits) == (32, 8)


# Kernel times, by a clock that needs no GPU


class FakeClock:
    """Pretends that a call launches two kernels, of 3 or 4 and of 5 microseconds; twice if cold."""

    name = "fake"

    def record(self, streams, *, cold):
        return [self.stream(stream, cold) for stream in streams]

    def stream(self, stream, cold):
        kernels = []
        for number in range(clock.LEAD + stream.calls):
            stream.launch()
            if cold:
                kernels.append(Kernel("flush", 0.0, 100.0))
            slower = 2.0 if cold else 1.0
            kernels.append(Kernel("score_kernel", 0.0, slower * (3.0 + number % 2)))
            kernels.append(Kernel("top_k", 9.0, slower * 5.0))
        stream.wait()
        return kernels


def settings_with(fake, *, repetitions=None, chains=False):
    repetitions = repetitions or measure.Repetitions(
        pipeline=4, warm=4, cold=4, calls=2, amortised=2, rounds=1
    )
    return measure.Settings(
        False, fake, CEILINGS, repetitions, chains=chains, calls=True, advance=lambda what: None
    )


def measured(implementation, settings):
    row = measure.Row(SMALL["small"], implementation)
    measure.compile_programs([row], settings)
    measure.measure([row], settings)
    return row


def measured_with(fake):
    return measured(implementations.IMPLEMENTATIONS["torch:eager"], settings_with(fake))


def test_kernel_times_are_sums_over_a_call_cold_and_warm():
    row = measured_with(FakeClock())
    assert row.status == "ok"
    assert row.numbers["warm"]["median"] == 8.5  # calls of 3 + 5 and 4 + 5
    assert row.numbers["cold"]["median"] == 17.0
    assert row.numbers["warm"]["count"] == 4
    assert row.numbers["launches"] == 2
    assert [part["kernel"] for part in row.numbers["breakdown"]] == ["top_k", "score_kernel"]
    work = ceilings.step_work(SMALL["small"])
    assert row.numbers["floor"] == ceilings.floor(work, CEILINGS)


def test_both_forms_of_a_jax_program_are_checked_and_the_one_without_graphs_recorded(monkeypatch):
    launched = []

    class Watched(implementations.JaxStep):
        def call(self):
            launched.append("user")
            super().call()

        def call_recorded(self):
            launched.append("recorded")
            super().call_recorded()

        def check(self, reference):
            launched.append("check")
            super().check(reference)

    known = dataclasses.replace(implementations.IMPLEMENTATIONS["jax:xla"], build=Watched)
    row = measured(known, settings_with(FakeClock()))
    assert row.status == "ok"
    assert launched[:8] == ["recorded"] * 3 + ["check"] + ["user"] * 3 + ["check"]
    recorded = 2 * (clock.LEAD + 4)  # cold and warm
    assert launched[8:] == ["recorded"] * recorded + ["user"] * 4


def test_a_call_without_kernels_fails_its_row_but_keeps_its_other_times():
    class Blind(FakeClock):
        def stream(self, stream, cold):
            return []

    row = measured_with(Blind())
    assert row.status == "failed"
    assert row.reason.startswith("kernel times: recorded 0 kernels of 7 calls")
    assert row.numbers["call"]["median"] > 0


def test_a_clock_that_lost_marks_fails_rows_but_keeps_their_other_times():
    class Lossy(FakeClock):
        def record(self, streams, *, cold):
            raise ClockError("expected 8 marks")

    row = measured_with(Lossy())
    assert (row.status, row.reason) == ("failed", "kernel times: expected 8 marks")
    assert row.numbers["call"]["median"] > 0


def test_streams_lie_between_marks_and_are_flushed_call_by_call(monkeypatch):
    launched = []

    def launch(name):
        launched.append(Kernel(name, float(len(launched)), 1.0))

    def record(function):
        launched.clear()
        function()
        return launched

    monkeypatch.setattr(clock.KernelClock, "_mark", lambda self: launch("mark"))
    monkeypatch.setattr(clock, "jax_flush", lambda: lambda: launch("flush"))
    streams = [
        clock.Stream(lambda name=name: launch(name), lambda: None, "jax", calls)
        for name, calls in (("a", 1), ("b", 2))
    ]
    device = clock.KernelClock("device", record)
    first, second = device.record(streams, cold=True)
    assert [kernel.name for kernel in first] == ["flush", "a"] * 4
    assert [kernel.name for kernel in second] == ["flush", "b"] * 5
    assert len(clock.cut(second, 2, cold=True)) == 2


def test_repetitions_end_where_time_does_but_not_for_our_pipelines():
    repetitions = measure.Repetitions()
    ours, torch, slow = (
        measure.Row(SMALL["small"], implementations.IMPLEMENTATIONS[name], seconds=seconds)
        for name, seconds in (("jax:top_k", 0.01), ("torch:eager", 0.001), ("torch:eager", 0.02))
    )
    assert measure.kernel_turns(ours, "warm", repetitions) == [100] * 10
    assert measure.kernel_turns(torch, "warm", repetitions) == [10] * 5
    assert measure.kernel_turns(slow, "warm", repetitions) == [10]
    assert measure.kernel_turns(slow, "cold", repetitions) == [10]


def test_a_chain_that_does_not_fit_leaves_the_other_times():
    class NoMemory(implementations.TorchStep):
        def chain(self):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    known = implementations.IMPLEMENTATIONS["torch:eager"]
    large = dataclasses.replace(known, build=functools.partial(NoMemory, name="eager"))
    row = measured(large, settings_with(None, chains=True))
    assert row.status == "ok"
    assert row.reason.startswith("out of memory while running a chain of steps: RESOURCE_EX")
    assert row.numbers["call"]["count"] == 2


def test_an_interrupted_run_keeps_what_it_has_and_says_so(tmp_path, monkeypatch, capsys):
    class Interrupted(implementations.TorchStep):
        def check(self, reference):
            raise KeyboardInterrupt

    known = implementations.IMPLEMENTATIONS["torch:eager"]
    forms = iter([implementations.TorchStep, Interrupted])
    changing = dataclasses.replace(known, build=lambda *inputs: next(forms)(*inputs, name="eager"))
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "torch:eager", changing)
    output = tmp_path / "r.json"
    argv = ["run", "--quick", "--workload", "small", "small-offset", "--output", str(output)]
    assert main([*argv, "--implementation", "torch:eager"]) == 130
    assert "interrupted: what was measured until then is kept" in capsys.readouterr().out
    first, second = rows_of(output)
    assert (first["status"], second["status"]) == ("ok", "skipped")
    assert first["call"]["count"] == 8
    assert second["reason"] == "interrupted"


def test_an_interrupted_build_keeps_what_it_has(tmp_path, monkeypatch):
    small = dataclasses.replace(SMALL["small"], L=64, S=None)
    for name in ("seed", "llama-128k-b4"):
        monkeypatch.setitem(build.WORKLOADS, name, dataclasses.replace(small, name=name))
    monkeypatch.setattr(build, "WITH_ORIGINAL", ())
    keys_of = build.keys_of

    def interrupted(w):
        if w.name != "seed":
            raise KeyboardInterrupt
        return keys_of(w)

    monkeypatch.setattr(build, "keys_of", interrupted)
    output = tmp_path / "r.json"
    argv = ["--workload", "seed", "llama-128k-b4", "seed", "--tokens", "128"]
    assert build.main([*argv, "--output", str(output)]) == 130
    assert [(row["workload"], row["status"]) for row in rows_of(output)] == [("seed", "ok")]


def test_a_sweep_leaves_the_cold_cache_out():
    row = measure.Row(SMALL["small"], implementations.IMPLEMENTATIONS["jax:top_k"], seconds=1e-3)
    assert measure.kernel_turns(row, "cold", choice.SWEEP_REPETITIONS) == []
    assert measure.kernel_turns(row, "warm", choice.SWEEP_REPETITIONS) == [50, 50]


def test_a_sweep_with_a_kernel_clock_times_kernels_only(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(run, "open_clock", lambda choice: (FakeClock(), CEILINGS, 0))
    monkeypatch.setitem(choice.SWEEPS, "batch", [{"B": 1}, {"B": 2}])
    output = tmp_path / "r.json"
    argv = ["run", "--sweep", "batch", "--workload", "small-grouped", "--L", "200"]
    argv += ["--implementation", "jax:xla", "torch:eager", "jax.lax.top_k"]
    assert main([*argv, "--output", str(output)]) == 0
    rows = rows_of(output)
    assert [(row["shape"]["B"], row["sweep"]) for row in rows] == [(1, "batch")] * 3 + [
        (2, "batch")
    ] * 3
    for row in rows:
        assert row["status"] == "ok"
        assert 8 <= row["warm"]["median"] <= 9  # how many calls there are is a matter of time
        assert not row.keys() & {"cold", "call", "amortised", "in_jit"}
    assert plots.pictures(tables.load([output]))[-1].file == "time-against-batch.png"


def test_ascending_scores_never_fall():
    workload = SMALL["small-sorted"]
    reference = agreement.Reference(workload, make_inputs(workload))
    scores = reference.scores(0, 0, 3)[: workload.L - 1]  # the last token is the step's own
    assert (np.diff(scores) >= 0).all()
    assert scores[-1] > scores[0]


def test_without_rich_progress_and_tables_are_plain_lines(monkeypatch, capsys):
    for module in ("rich.progress", "rich.console"):
        monkeypatch.setitem(sys.modules, module, None)
    with run.progress(2) as advance:
        advance("one")
        advance("two")
    tables.show("title", (["a", "b"], [["1", "x|y"]]))
    printed = capsys.readouterr().out
    assert "[1/2, 0 s] one\n[2/2, 0 s] two\n" in printed
    assert "| a | b |\n| --- | --- |\n| 1 | x\\|y |" in printed


# The report

README = f"# Title\n\nbefore\n\n{report.BEGIN}\nstale section\n{report.END}\n\nafter\n"


def stats(us):
    return clock.summary([us * factor for factor in (0.9, 1.0, 1.0, 1.1)] * 25)


def gpu_row(workload, implementation, us, *, sweep=None):
    framework = "jax" if implementation.startswith("jax") else "torch"
    numbers = {"compile_seconds": 1.0, "memory_bytes": 2**20, "launches": 2}
    for kind, slower in (("warm", 1.0), ("cold", 1.25), ("call", 4.0), ("amortised", 3.0)):
        numbers[kind] = stats(slower * us)
    numbers["event" if framework == "torch" else "in_jit"] = stats(2 * us)
    numbers["floor"] = ceilings.floor(ceilings.step_work(workload), CEILINGS)
    numbers["breakdown"] = [
        {"group": group, "kernel": group, "launches": 1.0, "us": share * us}
        for group, share in (("score", 0.5), ("top-k", 0.3), ("other", 0.2))
    ]
    known = implementations.IMPLEMENTATIONS[implementation]
    row = measure.Row(workload, known, numbers=numbers, done=True)
    return run.row_json(row, sweep)


def gpu_results(folder, *, device="NVIDIA H100", time="2026-01-02", us=20.0, file="a.json"):
    rows = []
    for name in ("seed", "llama-32k"):
        rows.append(gpu_row(WORKLOADS[name], "jax:top_k", us))
        rows.append(gpu_row(WORKLOADS[name], "torch:eager-graph", 5 * us))
        rows.append(gpu_row(WORKLOADS[name], "torch:iteration4", 8 * us))
    results = {
        "kind": "named",
        "time": time,
        "command": "python -m benchmarks run",
        "commit": "0123456789abcdef",
        "dirty": False,
        "machine": machine.describe_machine() | {"device": device, "gpu": True, "driver": "1.2"},
        "quick": False,
        "kernel_clock": "torch.profiler",
        "ceilings": dataclasses.asdict(CEILINGS),
        "rows": rows,
        "seconds": 1.0,
    }
    (folder / file).write_text(json.dumps(results))
    return results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with a README, and no committed results yet."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def run_report(folder, *argv):
    where = ["--readme", str(folder / "README.md"), "--pictures", str(folder)]
    return main(["report", *where, *argv])


def test_report_without_results_changes_nothing(folder):
    (folder / "output-of-tests.json").write_text('{"passed": 3}')
    assert run_report(folder) == 0
    assert run_report(folder, "--check") == 0
    assert (folder / "README.md").read_text() == README


def test_report_rewrites_its_section_of_the_readme_and_nothing_else(folder):
    gpu_results(folder)
    assert run_report(folder, "--check") == 1
    assert run_report(folder) == 0
    assert run_report(folder, "--check") == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("# Title\n\nbefore\n\n")
    assert text.endswith("\n\nafter\n")
    assert "stale section" not in text
    for told in ("NVIDIA H100", "driver 1.2", "0123456789ab", "python -m benchmarks run`"):
        assert told in text
    summary = next(line for line in text.splitlines() if line.startswith("| `llama-32k`"))
    assert "| 20.0 `top_k` | 1.10 | 100 `eager-graph` | **5.0x** | 160 | **8.0x** |" in summary
    assert "python -m benchmarks run --workload seed --implementation jax:top_k" in text


def test_a_readme_older_than_the_results_is_stale(folder, capsys):
    gpu_results(folder)
    assert run_report(folder) == 0
    gpu_results(folder, us=30.0)
    assert run_report(folder, "--check") == 1
    assert "is stale" in capsys.readouterr().out


def test_a_missing_picture_is_stale(folder, capsys):
    gpu_results(folder)
    assert run_report(folder) == 0
    (folder / "speed-up.png").unlink()
    assert run_report(folder, "--check") == 1
    assert "speed-up.png" in capsys.readouterr().out


def test_the_latest_run_of_a_workload_counts(folder):
    gpu_results(folder, file="z.json", time="2026-01-01", us=77.0)
    gpu_results(folder, file="a.json", time="2026-01-02", us=20.0)
    assert run_report(folder) == 0
    text = (folder / "README.md").read_text()
    assert "20.0 `top_k`" in text
    assert "77.0" not in text


def test_a_run_that_measured_nothing_hides_no_earlier_one(folder):
    gpu_results(folder, file="a.json", time="2026-01-01", us=20.0)
    results = gpu_results(folder, file="b.json", time="2026-01-02")
    for row in results["rows"]:
        row |= {"status": "skipped", "reason": "interrupted"}
    (folder / "b.json").write_text(json.dumps(results))
    assert run_report(folder) == 0
    text = (folder / "README.md").read_text()
    assert "20.0 `top_k`" in text
    assert "interrupted" not in text


def test_numbers_of_different_devices_are_not_compared(folder, capsys):
    gpu_results(folder)
    gpu_results(folder, device="NVIDIA H200", file="b.json")
    assert run_report(folder) == 1
    printed = capsys.readouterr().out
    assert "not compared" in printed
    assert "NVIDIA H100: a.json" in printed
    assert "NVIDIA H200: b.json" in printed
    assert (folder / "README.md").read_text() == README


def test_results_that_are_named_are_shown_and_leave_the_readme_alone(folder, capsys):
    gpu_results(folder)
    own = folder / "own"
    own.mkdir()
    gpu_results(own, us=77.0)
    assert run_report(folder, str(own / "a.json")) == 0
    assert "77.0" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == README


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a results file"),
        ("{broken", "expected a results file"),
        ("[1]", "expected a results file"),
        (
            '{"kind": "quality"}',
            "expected results of a kind in named, sweep, build, decode, got quality",
        ),
        ('{"kind": "named", "rows": []}', "expected command, commit, dirty, machine"),
    ],
)
def test_what_is_no_results_file_is_named(folder, text, message, capsys):
    (folder / "own.json").write_text(text)
    assert run_report(folder, str(folder / "own.json")) == 1
    assert f"own.json: {message}" in capsys.readouterr().out


def test_a_check_is_about_the_readme_alone(folder, capsys):
    gpu_results(folder)
    with pytest.raises(SystemExit):
        run_report(folder, "--check", str(folder / "a.json"))
    assert "--check: expected no files" in capsys.readouterr().err


def test_a_readme_without_markers_is_refused(folder, capsys):
    gpu_results(folder)
    (folder / "README.md").write_text("no markers")
    assert run_report(folder) == 1
    assert "expected <!-- benchmark:begin -->" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == "no markers"


def test_the_seed_table_has_both_sides(folder):
    gpu_results(folder)
    (_, rows) = tables.by_workload(tables.load([folder / "a.json"]))["seed"]
    heads, lines = tables.seed_table(rows)
    by_name = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    seeds = by_name["Iteration 4, the seed's"]
    assert (seeds["mean"], seeds["median"], seeds["score"]) == ("574", "530", "69.5")
    here = by_name["Iteration 4, here"]
    assert (here["median"], here["score"], here["top-k"]) == ("320", "80.0", "48.0")
    assert (here["sort"], here["other"], here["all kernels"]) == ("-", "32.0", "160")
    assert by_name["Iteration 1, here"]["mean"] == "-", "was not run"


def test_results_of_a_cpu_are_reported_by_calls(folder, small_run):
    _, output = small_run
    (folder / "cpu.json").write_text(output.read_text())
    assert run_report(folder) == 0
    text = (folder / "README.md").read_text()
    assert "There was no GPU" in text
    assert re.search(r"\| `small` \| [0-9.]+ `xla` \|", text)
    assert "floor" not in text.partition("</details>")[0]


@pytest.mark.parametrize("sweep", choice.SWEEPS)
def test_every_sweep_has_a_picture(folder, sweep):
    results = gpu_results(folder)
    points = choice.chosen_points(parsed(["--sweep", sweep]))
    rows = [
        gpu_row(point.workload, implementation, us * (number + 1), sweep=sweep)
        for number, point in enumerate(points)
        for implementation, us in (("jax:top_k", 5.0), ("torch:iteration4", 50.0))
    ]
    sweep_file = folder / "sweep.json"
    sweep_file.write_text(json.dumps(results | {"kind": "sweep", "rows": rows}))
    assert run_report(folder) == 0
    picture = folder / f"time-against-{sweep}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"(time-against-{sweep}.png)" in (folder / "README.md").read_text()


def test_a_build_is_checked_timed_and_reported(folder, monkeypatch, capsys):
    small = dataclasses.replace(SMALL["small"], name="seed", L=64, S=None)
    monkeypatch.setitem(build.WORKLOADS, "seed", small)
    argv = ["--workload", "seed", "--tokens", "128", "--output", str(folder / "build.json")]
    assert build.main(argv) == 0
    ours, original = rows_of(folder / "build.json")
    assert ours["command"] == "python -m benchmarks.build --workload seed --tokens 128"
    for row in (ours, original):
        assert row["status"] == "ok"
        assert row["shape"]["L"] == 128
        assert row["call"]["count"] == build.CALLS
        assert 0 < row["error"] < 1
    assert ours["error"] == pytest.approx(original["error"], rel=0.3)  # other random starts
    assert ours["memory_bytes"] > 0
    assert "wall-clock times only" in capsys.readouterr().out
    gpu_results(folder, device=machine.describe_machine()["device"])
    assert run_report(folder) == 0
    text = (folder / "README.md").read_text()
    assert "| `seed` | `torch:indexer_first` |" in text
    assert "python -m benchmarks.build --workload seed --tokens 128" in text


def test_a_decode_goes_on_until_a_segment_is_sealed(folder, monkeypatch, capsys):
    """On XLA, which keeps the state too, with a clock that makes times up."""
    small_sealing = functools.partial(
        state.sealing_for, smallest_segment=16, smallest_block=64, most_moves=4
    )
    for module in (cells, decode):
        monkeypatch.setattr(module, "sealing_for", small_sealing)
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(clock, "open_kernel_clock", FakeClock)
    monkeypatch.setattr(decode, "SELECTOR", None)
    small = dataclasses.replace(SMALL["small"], name="seed")
    monkeypatch.setitem(decode.DECODED, "seed", small)
    monkeypatch.setitem(decode.DECODED, "wide", dataclasses.replace(small, B=1))
    sealed = []
    measured = decode.Decoder

    class Decoder(measured):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            sealed.append([self.index.cells.sealed(self.index.lengths).tolist()])

        def wait(self):
            super().wait()
            sealed[-1].append(self.index.cells.sealed(self.index.lengths).tolist())

    monkeypatch.setattr(decode, "Decoder", Decoder)
    output = folder / "decode.json"
    assert decode.main(["--workload", "seed", "wide", "seed", "--output", str(output)]) == 0
    first, second = rows_of(output)
    assert (first["status"], first["segment"]) == ("ok", 64)
    assert (second["workload"], second["status"]) == ("wide", "ok")
    assert len(first["times"]) == first["steps"] == 64 + 2 + 16 + 2
    assert sealed == [[[192, 192], [256, 256]], [[192], [256]]]
    assert run_report(folder) == 0
    assert "Decoding with cells" in (folder / "README.md").read_text()


def test_a_decode_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        decode.main([])
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_a_build_on_a_cpu_is_made_smaller_only_if_asked(capsys):
    with pytest.raises(SystemExit):
        build.main([])
    assert "no NVIDIA GPU: give fewer tokens" in capsys.readouterr().err
    for tokens in ("0", "-3", "319"):
        with pytest.raises(SystemExit):
            build.main(["--tokens", tokens])
        assert f"--tokens: expected at least 320, got {tokens}" in capsys.readouterr().err


def test_codes_that_are_not_the_nearest_fail_a_build(folder, monkeypatch):
    small = dataclasses.replace(SMALL["small"], name="seed", L=64, S=None)
    monkeypatch.setitem(build.WORKLOADS, "seed", small)
    monkeypatch.setattr(build, "WITH_ORIGINAL", ())
    encode = build.oracle.encode
    monkeypatch.setattr(
        build.oracle, "encode", lambda *inputs: (encode(*inputs)[0] ^ 1, encode(*inputs)[1])
    )
    output = folder / "build.json"
    assert build.main(["--workload", "seed", "--tokens", "128", "--output", str(output)]) == 1
    (row,) = rows_of(output)
    assert row["status"] == "failed"
    assert "kv head 0, subspace 0, token" in row["reason"]


def test_the_readme_shows_the_committed_results(capsys):
    status = main(["report", "--check"])
    assert status == 0, capsys.readouterr().out


@pytest.mark.gpu
def test_the_pipeline_beats_iteration_4_on_the_seeds_workload(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "has_gpu", HAS_GPU)
    output = tmp_path / "seed.json"
    forms = ["jax:threshold", "jax:top_k", "torch:iteration4"]
    argv = ["run", "--quick", "--workload", "seed", "--implementation", *forms]
    assert main([*argv, "--output", str(output)]) == 0
    with capsys.disabled():
        print("\n" + capsys.readouterr().out)
    rows = {row["implementation"]: row for row in rows_of(output)}
    ours, theirs = rows["jax:top_k"], rows["torch:iteration4"]
    assert ours["warm"]["median"] < theirs["warm"]["median"]
    assert rows["jax:threshold"]["warm"]["median"] < ours["warm"]["median"]
