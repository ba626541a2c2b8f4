"""The benchmark program on a CPU: arithmetic, refusals, and whole runs on tiny workloads."""

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
    build,
    ceilings,
    clock,
    decode,
    frontier,
    jax_steps,
    layer,
    layer_steps,
    measure,
    report,
    results,
    run,
    torch_steps,
)
from benchmarks.__main__ import main, make_parser
from benchmarks.clock import ClockError, Kernel
from benchmarks.jax_steps import Forms
from jax_indexer import cells, state
from jax_indexer.kernels import backend
from parity import agreement, real_keys
from parity.inputs import SMALL, WORKLOADS, make_inputs
from parity.lowering import an_h100, lowered
from parity.progress import progress
from parity.quality import Layers

CEILINGS = ceilings.Ceilings(
    copy_bytes_per_second=3e12,
    lookups_per_second={"float32": 1e12, "bfloat16": 2e12, "float16": 2e12},
    kernel_us=1.5,
)


PARITY = Path(__file__).parent
ROOT = PARITY.parent


ABOVE_PARITY = ("test_benchmarks.py", "test_examples.py", "test_quality.py", "test_readme.py")


@pytest.mark.parametrize(
    ("folder", "never", "excepted"),
    [
        (PARITY, "benchmarks|examples", ABOVE_PARITY),
        (ROOT / "jax_indexer", "benchmarks|parity|torch_reference|torch", ()),
        (ROOT / "torch_reference", "benchmarks|parity|jax_indexer|jax", ()),
    ],
    ids=["parity", "jax_indexer", "torch_reference"],
)
def test_an_import_goes_one_way(folder, never, excepted):
    for path in folder.rglob("*.py"):
        found = re.findall(rf"^ *(?:from|import) (?:{never})\b.*", path.read_text(), re.MULTILINE)
        assert not found or path.name in excepted, (path, found)


# A clock that needs no GPU


class FakeClock:
    """Pretends that a call launches two kernels, of 3 or 4 and of 5 microseconds; twice if cold."""

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


# Arithmetic


def test_statistics_of_samples():
    found = clock.summary([4.0, 1.0, 3.0, 2.0, 10.0])
    assert list(found) == ["count", "min", "p20", "median", "p80", "p99", "max", "mean", "std"]
    # p20 is four fifths of the way from the lowest to the next, p80 a fifth from 4 to 10.
    wanted = [5, 1.0, 1.8, 3.0, 5.2, 9.76, 10.0, 4.0, 10**0.5]
    assert list(found.values()) == pytest.approx(wanted)


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
    """From a real profiler, whose records on a CPU have the same methods."""
    pytest.importorskip("torch_reference")  # before the profiler imports Triton
    torch = pytest.importorskip("torch")
    real = torch.profiler.profile
    on_cpu = lambda activities: real(activities=[torch.profiler.ProfilerActivity.CPU])  # noqa: E731
    monkeypatch.setattr(torch.profiler, "profile", on_cpu)
    assert clock.record_with_torch(lambda: torch.ones(3)) == []
    monkeypatch.setattr(torch.autograd.DeviceType, "CUDA", torch.autograd.DeviceType.CPU)
    found = clock.record_with_torch(lambda: torch.ones(3))
    assert "aten::ones" in {kernel.name for kernel in found}
    assert min(kernel.start for kernel in found) == 0
    assert all(0 <= kernel.duration < 1e6 for kernel in found)


def test_a_profiler_that_sees_no_kernels_is_refused():
    with pytest.raises(ClockError, match=r"recorded \[\] where JAX ran one kernel"):
        clock.KernelClock(lambda function: [])


ELEMENTWISE = "void at::native::_scatter_gather_elementwise_kernel<128, 8, at::native::_cuda_"


@pytest.mark.parametrize(
    ("framework", "stage_of"),
    [
        (
            "torch",
            {
                "pq_score_kernel_v3": "score",
                f"{ELEMENTWISE}scatter_gather_internal_kernel<false, float>": "score",
                "void at::native::mbtopk::radixFindKthValues<float, unsigned int>(...)": "top-k",
                "void at::native::bitonicSortKVInPlace<2, -1, 16, 16, float, long>": "top-k",
                "generate_sparse_indices_kernel": "index generation",
                f"{ELEMENTWISE}scatter_fill_internal_kernel<float>": "index generation",
                "void at::native::radixSortKVInPlace<2, -1, 128, 32, long, long>(...)": "sort",
                "Memcpy DtoD (Device -> Device)": "other",
            },
        ),
        (
            "jax",
            {
                "append_kernel_and_lookup_table_kernel_and_seal_kernel": "append, look-up table",
                "raft::matrix::detail::select::warpsort::block_kernel": "top-k",
                "void cub::DeviceSegmentedRadixSortKernel<float, 4>(float*)": "top-k",
                "loop_add_fusion_2": "other",
            },
        ),
    ],
)
def test_a_kernels_name_tells_its_stage_and_a_sort_after_top_k_is_part_of_it(framework, stage_of):
    assert clock.stages_of(kernels_named(stage_of), framework) == list(stage_of.values())


@pytest.mark.parametrize("path", sorted((ROOT / "jax_indexer/kernels").glob("*.py")))
def test_every_kernel_of_ours_has_a_stage(path):
    names = re.findall(r"^def (\w+_kernel)\(", path.read_text(), flags=re.MULTILINE)
    assert "other" not in clock.stages_of(kernels_named(names), "jax")


def test_the_time_of_a_stage_is_that_of_all_its_kernels():
    calls = [[Kernel("a", 0.0, 1.0), Kernel("score_kernel", 1.0, 9.0), Kernel("b", 3.0, 5.0)]] * 3
    assert clock.time_by_stage(calls, "jax") == {"scores": 9.0, "other": 6.0}


def test_ceilings_are_rates_of_the_fastest_call(monkeypatch):
    monkeypatch.setattr(ceilings, "COPY_BYTES", 2**12)
    monkeypatch.setattr(ceilings, "LOOKUP_PROGRAMS", 1)
    monkeypatch.setattr(ceilings, "TABLE_DTYPES", ("float32",))
    monkeypatch.setattr(ceilings, "REPEATS", 2)
    monkeypatch.setattr(ceilings.sum_of_lookups, "__kwdefaults__", {"lookups": 2})
    with backend.interpreted():
        found = ceilings.measure_ceilings(FakeClock())
    assert found.copy_bytes_per_second == pytest.approx(2 * 2**12 / 8e-6)  # 3 + 5 microseconds
    assert found.kernel_us == 8.0
    together, subspaces = 4, ceilings.LOOKUPS_PER_CODE
    rate = ceilings.LOOKUP_BLOCK * together * subspaces / 8e-6
    assert found.lookups_per_second == {"float32": pytest.approx(rate)}


# Runs


HAS_GPU = results.has_gpu


@pytest.fixture(autouse=True, scope="module")
def without_gpu():
    """Runs are those of a CPU everywhere, a busy one too, with chains that compile quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SECONDS_A_MEASUREMENT", 10)
        patch.setattr(results, "has_gpu", lambda: False)
        patch.setattr(jax_steps, "CHAIN_STEPS", 2)
        yield


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is one, whose profiler and rates are made up."""
    monkeypatch.setattr(results, "has_gpu", lambda: True)
    monkeypatch.setattr(measure, "KernelClock", FakeClock)
    monkeypatch.setattr(run, "measure_ceilings", lambda clock: CEILINGS)


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
    found = json.loads(output.read_text())
    assert status == 0
    assert [(row["workload"], row["implementation"], row["status"]) for row in found["rows"]] == [
        ("small", "jax:xla", "ok"),
        ("small", "torch:eager", "ok"),
    ]
    for row in found["rows"]:
        assert row["call"]["count"] == 8
        assert 0 < row["call"]["min"] <= row["call"]["median"] <= row["call"]["max"]
        assert row["compile_seconds"] > 0
        assert not row.keys() & {"warm", "floor"}
    assert found["rows"][0]["in_jit"]["median"] > 0
    assert (found["commit"], found["dirty"]) == ("abc123", True)
    assert found["machine"]["device"].startswith("CPU: ")
    assert "ceilings" not in found
    assert found["command"] == "python -m benchmarks run --quick --workload small"
    lines = output.read_text().splitlines()
    assert [line for line in lines if '"jax:xla"' in line] == [json.dumps(found["rows"][0]) + ","]


def test_a_run_with_a_gpu_times_kernels_cold_and_warm_and_chains(tmp_path, gpu):
    output = tmp_path / "r.json"
    argv = ["run", "--quick", "--workload", "small", "--output", str(output), "--implementation"]
    assert main([*argv, "jax:xla", "torch:eager"]) == 0
    found = json.loads(output.read_text())
    assert found["ceilings"] == CEILINGS._asdict()
    for row in found["rows"]:
        assert row["status"] == "ok"
        assert 8 <= row["warm"]["median"] <= 9  # calls of 3 + 5 and of 4 + 5
        assert 16 <= row["cold"]["median"] <= 18
        assert (row["warm"]["count"], row["cold"]["count"], row["launches"]) == (10, 5, 2)
        assert row["stages"]["top-k"] == 5
        assert row["call"]["count"] == 8
        work = ceilings.step_work(SMALL["small"])
        assert row["floor"]["us"] == pytest.approx(ceilings.floor(work, CEILINGS)["us"], rel=1e-4)
    assert [("in_jit" in row) for row in found["rows"]] == [True, False]


def test_a_sweep_with_a_gpu_times_kernels_only(tmp_path, gpu, monkeypatch):
    monkeypatch.setitem(run.SWEEPS, "batch", [{"B": 1}, {"B": 2}])
    output = tmp_path / "r.json"
    argv = ["run", "--sweep", "batch", "--workload", "small-grouped", "--L", "200"]
    argv += ["--implementation", "torch:eager", "jax.lax.top_k", "torch.topk"]
    assert main([*argv, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    shapes = [found["workloads"][row["workload"]] for row in found["rows"]]
    assert [shape["B"] for shape in shapes] == [1, 1, 1, 2, 2, 2]
    for row in found["rows"]:
        assert (row["status"], row["sweep"]) == ("ok", "batch")
        assert 8 <= row["warm"]["median"] <= 9
        assert not row.keys() & {"cold", "call", "amortised", "in_jit"}
    assert list(report.pictures(results.load([output]))) == ["time-against-batch.png"]


def test_a_run_without_kernel_times_says_so_and_goes_on(tmp_path, gpu, monkeypatch, capsys):
    def refuses():
        raise ClockError("the profiler recorded [] where JAX ran one kernel")

    monkeypatch.setattr(measure, "KernelClock", refuses)
    output = tmp_path / "r.json"
    argv = ["run", "--quick", "--workload", "small", "--output", str(output), "--implementation"]
    assert main([*argv, "torch:eager"]) == 1
    assert "failed: no kernel times, which PyTorch's profiler records: " in capsys.readouterr().out
    (row,) = rows_of(output)
    assert (row["status"], row["reason"]) == ("ok", "no kernel times")
    assert row["call"]["count"] == 8


@pytest.mark.parametrize(
    ("command", "messages"),
    [
        ("run --workload nonsense", [*WORKLOADS, "nonsense"]),
        ("run --implementation nonsense", [*run.IMPLEMENTATIONS, "nonsense"]),
        ("run --workload ragged --B 3", ["L: expected one number or 3, got 16"]),
        ("run --workload small --L 0", ["L: expected at least the step's own 1, got 0"]),
        ("run --workload small --L 300 --S 200", ["L: expected numbers in 0..S=200, got 300"]),
        ("run --workload small --L -1 --S 9", ["L: expected numbers in 0..S=9, got -1"]),
        ("run --workload small --K 0", ["K: expected at least 1, got 0"]),
        ("run --workload small --bits 9", ["num_bits: expected an integer in 1..8, got 9"]),
        ("run --sweep length --L 9", ["--L: expected nothing, since the sweep of length sets it"]),
        ("run --sweep --bits 4", ["--bits: expected nothing, since the sweep of subspaces"]),
        ("run --out x.json", ["unrecognized arguments: --out"]),
        ("layer --workload nonsense", [*WORKLOADS, *layer.SCANS, "nonsense"]),
        ("layer --implementation nonsense", [*layer.IMPLEMENTATIONS, "nonsense"]),
        ("layer --sweep --scan", ["--scan: not allowed with argument --sweep"]),
        ("build", ["no NVIDIA GPU: give fewer tokens"]),
        ("build --tokens 319", ["--tokens: expected at least 320, got 319"]),
        ("decode", ["no NVIDIA GPU"]),
        ("quality --real-keys nowhere", ["nowhere", "python -m parity.real_keys"]),
        ("report --check a.json", ["--check: expected no files"]),
    ],
)
def test_wrong_usage_ends_before_anything_is_measured(command, messages, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(command))
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert all(message in printed for message in messages)


@pytest.fixture
def layers(tmp_path):
    """A folder with a file that the quality program reads."""
    names = [f"layer{layer}_{name}" for layer in real_keys.LAYERS for name in Layers._fields]
    arrays = {name: np.zeros((4, 1, 8), np.float16) for name in names}
    np.savez(tmp_path / real_keys.FILE_NAME, **arrays)
    return tmp_path


@pytest.mark.parametrize("name", ["", ".", "file/in-a-file.json"])
def test_an_output_that_cannot_be_written_is_found_first(name, layers, monkeypatch, capsys):
    (layers / "file").touch()
    monkeypatch.chdir(layers)
    for argv in (["run"], ["build", "--tokens", "512"], ["quality", "--real-keys", "."]):
        with pytest.raises(SystemExit) as stopped:
            main([*argv, "--output", name])
        assert stopped.value.code == 2
        assert "--output: expected a file that can be written, got" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK no zip", b"nothing"])
def test_keys_that_cannot_be_read_are_named(content, tmp_path, capsys):
    (tmp_path / real_keys.FILE_NAME).write_bytes(content)
    with pytest.raises(SystemExit):
        main(["quality", "--real-keys", str(tmp_path)])
    assert "--real-keys: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            f"small --S {2**45} --L {2**45} --implementation torch:eager",
            "GiB or more, this machine",
        ),
        ("small --implementation jax:top_k", "needs an NVIDIA GPU"),
        (
            "small-three-queries --L 200 --implementation torch:eager",
            "the original returns the list of the first query token only",
        ),
    ],
)
def test_what_cannot_be_done_is_skipped_with_the_reason(words, reason, tmp_path, capsys):
    output = tmp_path / "r.json"
    argv = ["run", "--output", str(output), "--workload", *words.split()]
    assert main(argv) == 1  # nothing was measured
    (row,) = rows_of(output)
    assert row["status"] == "skipped"
    assert reason in row["reason"]
    assert reason in report.document(results.load([output]), {})
    assert "No NVIDIA GPU: wall-clock times only" in capsys.readouterr().out


class WrongStep(torch_steps.TorchStep):
    """Lists another token than it should, in the last batch row."""

    def call(self):
        super().call()
        ((lists, *others),) = self._results
        lists = lists.clone()
        lists[-1, 2, 5] += 1
        self._results = [(lists, *others)]


class BrokenStep(torch_steps.TorchStep):
    def __init__(self, *_, **__):
        raise RuntimeError("a kernel that does not compile\nand its long log")


EAGER = run.IMPLEMENTATIONS["torch:eager"]


def eager_as(step):
    return dataclasses.replace(EAGER, build=lambda reference, _: step(reference, name="eager"))


def test_a_wrong_output_fails_the_run_and_spares_the_other_rows(tmp_path, monkeypatch, capsys):
    for name, step in (("torch:wrong", WrongStep), ("torch:broken", BrokenStep)):
        changed = dataclasses.replace(eager_as(step), name=name)
        monkeypatch.setitem(run.IMPLEMENTATIONS, name, changed)
    output = tmp_path / "r.json"
    argv = ["run", "--quick", "--workload", "small", "--output", str(output), "--implementation"]
    assert main([*argv, "torch:wrong", "torch:broken", "torch:eager"]) == 1
    wrong, broken, good = rows_of(output)
    assert wrong["status"] == "failed"
    assert wrong["reason"].startswith("wrong output: batch row 1, query token 0, head 2: ")
    assert broken["status"] == "failed"
    assert broken["reason"] == "building: RuntimeError: a kernel that does not compile"
    assert good["status"] == "ok"
    assert good["call"]["median"] > 0
    printed = capsys.readouterr().out
    assert "python -m benchmarks run --workload small --implementation torch:wrong" in printed
    assert "2 failed" in printed


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


@pytest.fixture(scope="module")
def small_step():
    """A step of XLA that was called, what it is checked by, and its programs."""
    reference = agreement.Reference(SMALL["small"], make_inputs(SMALL["small"]))
    with jax_steps.compilers() as pool:
        forms = Forms(pool, chains=True)
        programs = run.IMPLEMENTATIONS["jax:xla"].programs(SMALL["small"], forms)
    step = jax_steps.JaxStep(reference, programs)
    step.call()
    step.check(reference)
    return step, reference, programs


def test_weights_that_do_not_match_the_list_are_rejected(small_step, monkeypatch):
    step, reference, _ = small_step
    weights = step.selection.weights.at[0, 0, 1, 0].set(0)
    monkeypatch.setattr(step, "selection", dataclasses.replace(step.selection, weights=weights))
    with pytest.raises(AssertionError, match=r"head 1: weight 0\.0 at token 0, which the list has"):
        step.check(reference)


@pytest.mark.parametrize("name", ["jax:cells", "jax:threshold", "jax:top_k"])
def test_steps_and_chains_of_kernels_lower_for_a_gpu(name, monkeypatch):
    found = {}

    def lower(forms, function, arguments, *, donate):
        options = {"donate_argnames": donate, "keep_unused": True}
        found[function.__name__] = lowered(function, *arguments, **options)

    monkeypatch.setattr(jax_steps, "Program", lower)
    with an_h100():
        run.IMPLEMENTATIONS[name].programs(WORKLOADS["seed"], Forms(None, chains=True))
    assert list(found) == ["step", "chain"]
    assert all("triton" in text for text in found.values())


def test_a_chain_computes_every_step_anew(small_step):
    """XLA would share tables, scores and lists if queries did not depend on the step before."""
    _, _, programs = small_step
    step, chain = (programs[name].lowered.compile().as_text() for name in ("step", "chain"))
    for operation in (" dot(", " sort("):
        assert step.count(operation) > 0
        assert chain.count(operation) == 2 * step.count(operation)


def test_a_chain_whose_last_step_is_not_that_of_the_step_alone_is_rejected(small_step):
    step, reference, _ = small_step
    chain = step.chain()
    chain.call()
    chain.wait()
    chain.check(reference)
    chain.digest = chain.digest.at[1, 0, 2].add(1)
    with pytest.raises(AssertionError, match="batch row 1, query token 0, head 2: the last step's"):
        chain.check(reference)


def test_a_digest_depends_on_all_that_a_step_returns(small_step):
    selection = small_step[0].selection
    digest = np.asarray(jax_steps.digest_of(selection))
    assert (digest >= 0).all()
    for name in ("indices", "counts", "weights"):
        array = getattr(selection, name)
        place = (1, 0, 2) + (0,) * (array.ndim - 3)
        other = dataclasses.replace(selection, **{name: array.at[place].set(1 - array[place])})
        changed = np.argwhere(np.asarray(jax_steps.digest_of(other)) != digest)
        np.testing.assert_array_equal(changed, [(1, 0, 2)])


def parsed(command):
    python, module, name, *words = shlex.split(command)
    assert (python, module, name) == ("python", "-m", "benchmarks")
    return make_parser().parse_args(words)


@pytest.mark.parametrize(
    "words",
    [
        "--workload seed --L 64000 --no-weights --heavy 512 --dtype bfloat16",
        "--workload small-short --L 20 40 60 --bits 3 --table-dtype float16",
        "--workload small --scores equal",
        "--sweep length",
        "--sweep subspaces --workload million",
    ],
)
def test_a_row_is_repeated_by_its_command(words):
    for point in run.chosen_points(parsed(f"python -m benchmarks run {words}")):
        again = parsed(results.command_of("named", point.workload.name, "jax:xla"))
        assert [found.workload for found in run.chosen_points(again)] == [point.workload]
        assert run.chosen_implementations(again) == [run.IMPLEMENTATIONS["jax:xla"]]


def test_a_recorded_command_names_no_path_of_this_machine():
    argv = ["quality", "--real-keys", "/here", "--quick", "--output=/there", "--commit", "abc"]
    recorded = "python -m benchmarks quality --real-keys DIR --quick"
    assert results.repeatable(argv) == recorded


# Rows that go wrong


def measured(implementation, fake, *, chains=False):
    repetitions = measure.Repetitions(pipeline=4, warm=4, cold=4, calls=2, amortised=2, rounds=1)
    settings = measure.Settings(
        lambda w: agreement.Reference(w, make_inputs(w)), repetitions, fake, CEILINGS, chains
    )
    row = measure.Row(SMALL["small"], implementation, "named")
    for _ in measure.measure_all([[row]], settings):
        pass
    return row


def test_both_forms_of_a_program_are_checked_and_the_one_without_graphs_recorded():
    launched = []

    class Watched(torch_steps.TorchStep):
        def call(self):
            launched.append("user")
            super().call()

        def call_recorded(self):
            launched.append("recorded")
            super().call()

        def check(self, reference):
            launched.append("check")
            super().check(reference)

    row = measured(eager_as(Watched), FakeClock())
    assert row.status == "ok"
    first = launched.index("recorded")
    assert launched[first : first + 8] == ["recorded"] * 3 + ["check"] + ["user"] * 3 + ["check"]
    recorded = 2 * (clock.LEAD + 4)  # cold and warm
    assert launched[first + 8 :] == ["recorded"] * recorded + ["user"] * 4


class Blind(FakeClock):
    def stream(self, stream, cold):
        return []


class Lossy(FakeClock):
    def record(self, streams, *, cold):
        raise ClockError("expected 8 marks")


@pytest.mark.parametrize(
    ("fake", "reason"),
    [(Blind(), "recorded 0 kernels of 7 calls"), (Lossy(), "expected 8 marks")],
)
def test_a_clock_that_loses_kernels_fails_rows_but_keeps_their_other_times(fake, reason):
    row = measured(EAGER, fake)
    assert row.status == "failed"
    assert row.reason.startswith(f"kernel times: {reason}")
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
    device = clock.KernelClock(record)
    first, second = device.record(streams, cold=True)
    assert [kernel.name for kernel in first] == ["flush", "a"] * 4
    assert [kernel.name for kernel in second] == ["flush", "b"] * 5
    assert len(clock.cut(second, 2, cold=True)) == 2
    with pytest.raises(ClockError, match=r"expected 6 marks .* got 4"):
        clock.between_marks(launched, "mark", 3)


def test_repetitions_end_where_time_does_but_not_for_our_pipelines(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS_A_MEASUREMENT", 0.2)
    repetitions = measure.Repetitions()
    ours, torch, slow = (
        measure.Row(SMALL["small"], run.IMPLEMENTATIONS[name], "named", seconds=seconds)
        for name, seconds in (("jax:top_k", 0.01), ("torch:eager", 0.001), ("torch:eager", 0.02))
    )
    assert measure.kernel_turns(ours, "warm", repetitions) == [100] * 10
    assert measure.kernel_turns(torch, "warm", repetitions) == [10] * 5
    assert measure.kernel_turns(slow, "warm", repetitions) == [10]
    assert measure.kernel_turns(slow, "cold", repetitions) == [10]
    assert measure.kernel_turns(ours, "cold", run.SWEEP_REPETITIONS) == []
    assert measure.kernel_turns(ours, "warm", run.SWEEP_REPETITIONS) == [50, 50]


def test_a_chain_that_does_not_fit_leaves_the_other_times():
    class NoMemory(torch_steps.TorchStep):
        def chain(self):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    row = measured(eager_as(NoMemory), None, chains=True)
    assert row.status == "ok"
    assert row.reason.startswith("out of memory while running a chain of steps: RESOURCE_EX")
    assert row.numbers["call"]["count"] == 2


def test_an_interrupted_run_keeps_what_it_has_and_says_so(tmp_path, monkeypatch, capsys):
    class Interrupted(torch_steps.TorchStep):
        def check(self, reference):
            raise KeyboardInterrupt

    forms = iter([torch_steps.TorchStep, Interrupted])
    changing = eager_as(lambda *inputs, **name: next(forms)(*inputs, **name))
    monkeypatch.setitem(run.IMPLEMENTATIONS, "torch:eager", changing)
    output = tmp_path / "r.json"
    argv = ["run", "--quick", "--workload", "small", "small-offset", "--output", str(output)]
    assert main([*argv, "--implementation", "torch:eager"]) == 130
    assert "interrupted: what was measured until then is kept" in capsys.readouterr().out
    first, second = rows_of(output)
    assert (first["status"], second["status"]) == ("ok", "skipped")
    assert first["call"]["count"] == 8
    assert second["reason"] == "interrupted"


def test_without_rich_progress_and_tables_are_plain_lines(monkeypatch, capsys):
    for module in ("rich.progress", "rich.console"):
        monkeypatch.setitem(sys.modules, module, None)
    with progress(2) as advance:
        advance("one")
        advance("two")
    monkeypatch.setattr(report, "all_tables", lambda _: {"title": (["a", "b"], [["1", "x|y"]])})
    report.show([])
    printed = capsys.readouterr().out
    assert "[1/2, 0 s] one\n[2/2, 0 s] two\n" in printed
    assert "| a | b |\n| --- | --- |\n| 1 | x\\|y |" in printed


# The report

OLD_README = (
    f"# Title\n\nbefore\n\n{report.BEGIN}\nstale section\n{report.END}\n\n"
    f"{report.QUALITY_BEGIN}\nolder\n{report.QUALITY_END}\n\nafter\n"
)


def stats(us):
    return clock.summary([us * factor for factor in (0.9, 1.0, 1.0, 1.1)] * 25)


def gpu_row(workload, implementation, us, *, sweep=None):
    numbers = {"compile_seconds": 1.0, "memory_bytes": 2**20, "launches": 2}
    for kind, slower in (("warm", 1), ("cold", 1.25), ("call", 4), ("amortised", 3), ("in_jit", 2)):
        numbers[kind] = stats(slower * us)
    numbers["floor"] = ceilings.floor(ceilings.step_work(workload), CEILINGS)
    numbers["stages"] = {"score": 0.5 * us, "top-k": 0.3 * us, "other": 0.2 * us}
    known = run.IMPLEMENTATIONS[implementation]
    return measure.Row(workload, known, "named", sweep, numbers=numbers, done=True)


def gpu_results(
    folder, *, kind=None, device="NVIDIA H100", time="2026-01-02", us=20.0, file="a.json", rows=()
):
    """A results file of a GPU: of these rows, or of some of two workloads."""
    rows = rows or [
        gpu_row(WORKLOADS[name], implementation, us * factor)
        for name in ("seed", "llama-32k")
        for implementation, factor in (
            ("jax:top_k", 1),
            ("torch:eager-graph", 5),
            ("torch:iteration4", 8),
        )
    ]
    found = {
        "kind": kind or ("sweep" if rows[0].sweep else "named"),
        "time": time,
        "command": "python -m benchmarks run",
        "commit": "0123456789abcdef",
        "dirty": False,
        "machine": results.describe_machine() | {"device": device, "gpu": True, "driver": "1.2"},
        "quick": False,
        "seconds": 1.0,
        "workloads": {row.workload.name: results.shape_of(row.workload) for row in rows},
        "rows": [row.json() for row in rows],
    }
    results.write(folder / file, found)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with a README, and no committed results yet."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "EVALUATIONS", tmp_path / "evaluations")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(OLD_README)
    return tmp_path


def texts(folder):
    return [(folder / name).read_text() for name in ("README.md", "REPORT.md")]


def test_report_without_results_changes_nothing(folder):
    assert main(["report"]) == 0
    assert main(["report", "--check"]) == 0
    assert (folder / "README.md").read_text() == OLD_README


def test_report_writes_one_table_into_the_readme_and_all_else_into_a_file(folder, capsys):
    gpu_results(folder)
    assert main(["report", "--check"]) == 1
    assert main(["report"]) == 0
    assert main(["report", "--check"]) == 0
    readme, document = texts(folder)
    assert readme.startswith("# Title\n\nbefore\n\n")
    assert readme.endswith("\n\nafter\n")
    assert "stale section" not in readme
    lines = [line for line in readme.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == list(report.IN_README)
    assert lines[1] == (
        "| `llama-32k`: 1 row, 32k tokens | 20.0 `top_k` | 160 | **8.0x** | 100 `eager-graph` "
        "| **5.0x** |"
    )
    for text in readme, document:
        for told in ("NVIDIA H100", "driver 1.2", "0123456789ab;", "python -m benchmarks run`"):
            assert text.count(told) == 1
    command = "python -m benchmarks run --workload seed --implementation jax:top_k\n"
    assert (readme.count(command), document.count(command)) == (0, 1)


def test_what_is_older_than_the_results_is_stale(folder, capsys):
    gpu_results(folder)
    assert main(["report"]) == 0
    gpu_results(folder, us=30.0)
    before = texts(folder)
    assert main(["report", "--check"]) == 1
    printed = capsys.readouterr().out
    assert "README.md is stale" in printed
    assert "REPORT.md is stale" in printed
    assert texts(folder) == before


def test_the_latest_run_of_a_workload_counts_unless_it_measured_nothing(folder):
    gpu_results(folder, file="z.json", time="2026-01-01", us=77.0)
    gpu_results(folder, file="a.json", time="2026-01-02", us=20.0)
    found = gpu_results(folder, file="b.json", time="2026-01-03")
    for row in found["rows"]:
        row |= {"status": "skipped", "reason": "interrupted"}
    results.write(folder / "b.json", found)
    assert main(["report"]) == 0
    readme, document = texts(folder)
    assert "20.0 `top_k`" in readme
    assert "77.0" not in document
    assert "interrupted" not in document


def test_numbers_of_different_devices_are_not_compared(folder, capsys):
    gpu_results(folder)
    gpu_results(folder, device="NVIDIA H200", file="b.json")
    assert main(["report"]) == 1
    printed = capsys.readouterr().out
    assert "not compared" in printed
    assert "NVIDIA H100: a.json" in printed
    assert "NVIDIA H200: b.json" in printed
    assert (folder / "README.md").read_text() == OLD_README


def test_tables_of_one_report_may_be_of_different_devices(folder):
    gpu_results(folder)
    found = gpu_results(folder, device="NVIDIA H200", file="b.json")
    for row in found["rows"]:
        row["sweep"] = "batch"
    results.write(folder / "b.json", found)
    assert main(["report"]) == 0
    readme, document = texts(folder)
    assert "NVIDIA H100" in readme
    assert "NVIDIA H200" not in readme
    assert "NVIDIA H200" in document
    del found["rows"][0]["sweep"]  # which would stand beside the other file's
    results.write(folder / "b.json", found)
    assert main(["report"]) == 1


def test_results_that_are_named_are_shown_and_leave_the_readme_alone(folder, capsys):
    gpu_results(folder, us=77.0)
    assert main(["report", str(folder / "a.json")]) == 0
    assert "77.0" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == OLD_README


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a results file"),
        ("{broken", "expected a results file"),
        ("[1]", "expected a results file"),
        ('{"kind": "tests"}', "expected results of a kind in named, sweep, layer, build"),
        ('{"kind": "named", "rows": []}', "expected command, commit, dirty, machine"),
    ],
)
def test_what_is_no_results_file_is_named(folder, text, message, capsys):
    (folder / "own.json").write_text(text)
    assert main(["report", str(folder / "own.json")]) == 1
    assert f"own.json: {message}" in capsys.readouterr().out


def test_a_readme_without_markers_is_refused(folder, capsys):
    gpu_results(folder)
    (folder / "README.md").write_text("no markers")
    assert main(["report"]) == 1
    assert "expected <!-- speed:begin -->" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == "no markers"


def test_the_seed_table_has_both_sides(folder):
    heads, lines = report.seed_table(gpu_results(folder)["rows"])
    by_name = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    document = by_name["Iteration 4, the document's"]
    assert [document[head] for head in ("call, mean", "call, median", "score")] == [
        "574", "530", "69.5",
    ]  # fmt: skip
    here = by_name["Iteration 4, here"]
    assert (here["call, median"], here["score"], here["top-k"]) == ("640", "80.0", "48.0")
    assert (here["sort"], here["other"], here["all kernels"]) == ("-", "32.0", "160")
    assert by_name["Iteration 1, here"]["call, mean"] == "-", "was not run"


def test_results_of_a_cpu_are_reported_by_calls(folder, small_run):
    _, output = small_run
    (folder / "cpu.json").write_text(output.read_text())
    assert main(["report"]) == 0
    _, document = texts(folder)
    assert "There was no GPU" in document
    assert re.search(r"\| `small`: 2 rows, [a-z0-9, ]+ \| [0-9.]+ `xla` \|", document)
    assert "floor" not in document


@pytest.mark.parametrize("sweep", run.SWEEPS)
def test_every_sweep_has_a_picture_and_misses_it(folder, sweep, capsys):
    points = run.chosen_points(parsed(f"python -m benchmarks run --sweep {sweep}"))
    rows = [
        gpu_row(point.workload, implementation, us * (number + 1), sweep=sweep)
        for number, point in enumerate(points)
        for implementation, us in (("jax:top_k", 5.0), ("torch:iteration4", 50.0))
    ]
    gpu_results(folder, rows=rows)
    assert main(["report"]) == 0
    picture = folder / f"time-against-{sweep}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"({picture.name})" in texts(folder)[1]
    picture.unlink()
    assert main(["report", "--check"]) == 1
    assert f"{picture.name} is missing" in capsys.readouterr().out


# Layers

SCANS = {
    w.name: w
    for w in (
        layer_steps.LayerWorkload(
            **{**vars(SMALL["small-grouped"]), "name": "layers", "L": (200, 131), "layers": 2}
        ),
        layer_steps.LayerWorkload(
            **{**vars(SMALL["small-grouped"]), "name": "steps", "L": (256, 131), "steps": 3}
        ),
    )
}


@pytest.fixture
def scans(monkeypatch):
    """Scans of sizes for a CPU."""
    monkeypatch.setattr(layer, "SCANS", SCANS)


def of_layer(output, words):
    """The status and the rows of `layer`."""
    status = main(["layer", "--quick", *words.split(), "--output", str(output)])
    return status, rows_of(output)


@pytest.fixture(scope="module")
def layer_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("layer") / "layer.json"
    return (*of_layer(output, "--workload small-grouped --B 1 --L 131"), output)


POOL = "small-grouped --rerank 2 --estimate-rest mean"


def test_a_layer_that_reranks_and_has_a_rest_is_measured(tmp_path):
    words = f"--workload {POOL} --implementation jax:xla jax:full-xla torch:sdpa"
    status, rows = of_layer(tmp_path / "r.json", words)
    assert status == 0
    assert (rows[0]["workload"], rows[0]["status"]) == (POOL, "ok")
    assert rows[2]["status"] == "skipped"  # it has neither
    again = parsed(results.command_of("layer", POOL, "jax:xla"))
    (w,) = layer.chosen_workloads(again)
    assert w.config.pool.heavy_size == 2 * SMALL["small-grouped"].config.heavy_size


def test_a_layer_is_measured_beside_its_peers_and_attention_alone(layer_run):
    status, rows, _ = layer_run
    assert [(row["implementation"], row["status"]) for row in rows] == [
        ("jax:xla", "ok"),
        ("jax:full-xla", "ok"),
        ("torch:original", "ok"),
        ("torch:sdpa", "ok"),
        ("jax.sparse_attention", "ok"),
        ("torch.sparse_attention", "ok"),
    ]
    assert status == 0
    assert all(row["call"]["median"] > 0 for row in rows)
    assert rows[3]["form"] in ("flash", "cudnn", "efficient")


def test_layers_of_a_cpu_are_reported_by_calls(folder, layer_run):
    (folder / "cpu.json").write_text(layer_run[2].read_text())
    assert main(["report"]) == 0
    name = re.escape("`small-grouped --B 1 --L 131`: 1 row, 131 tokens, budget 12")
    line = rf"\| {name} \| [0-9.]+ `[a-z-]+` \| [0-9]+ \| [0-9.]+ `xla` \|"
    assert re.search(line, texts(folder)[1])


def test_layers_and_steps_are_scanned_and_unrolled(folder, gpu, scans):
    status, rows = of_layer(folder / "a.json", "--scan --implementation jax:xla jax:full-xla")
    assert status == 0
    status, others = of_layer(
        folder / "b.json", "--workload layers --implementation torch:sdpa jax:full-xla-unrolled"
    )
    there = [row for row in [*rows, *others] if row["status"] == "ok"]
    assert [(row["workload"], row["implementation"]) for row in there] == [
        ("layers", "jax:xla"),
        ("steps", "jax:xla"),
        ("steps", "jax:full-xla"),
        ("layers", "jax:full-xla-unrolled"),
    ]
    for row in there:
        assert 8 <= row["warm"]["median"] <= 9
        assert row["amortised"]["median"] > 0
    assert main(["report"]) == 0
    assert (
        "| `steps`: 2 rows, 131..256 tokens, budget 12, 3 steps | `jax:xla` |" in (texts(folder)[1])
    )


def test_a_sweep_of_layers_times_cold_kernels_and_has_a_picture(folder, gpu, monkeypatch):
    monkeypatch.setattr(layer, "SWEPT", [{"B": 1, "L": 100}, {"B": 2, "L": 100}])
    words = "--sweep --workload small-grouped --implementation jax:full-xla torch:sdpa"
    status, rows = of_layer(folder / "a.json", words)
    assert status == 0
    for row in rows:
        assert (row["status"], row["sweep"]) == ("ok", "layer")
        assert 16 <= row["cold"]["median"] <= 18
        assert "call" not in row
    assert main(["report"]) == 0
    picture = folder / "layer-against-length.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"({picture.name})" in texts(folder)[1]


def test_a_sweep_of_layers_has_the_selector_that_a_user_gets(gpu):
    rows = layer.chosen_rows(parsed("python -m benchmarks layer --sweep"))
    ours = {group[0].workload.L: group[0].implementation.name for group in rows}
    assert ours == {2**10: "jax:threshold", 2**12: "jax:threshold", 2**14: "jax:threshold"} | (
        dict.fromkeys((2**16, 2**18, 2**20), "jax:cells")
    )


def test_a_frontier_has_what_reranks_beside_full_attention_once(gpu):
    groups = list(layer.chosen_rows(parsed(FRONTIER)))
    names = {group[0].workload.name: [x.implementation.name for x in group] for group in groups}
    beside = [name for name, found in names.items() if found == ["jax:cells", "jax:full-cudnn"]]
    assert beside == ["llama-128k-b4", "llama-128k-b4 --B 1"]
    assert sum(found == ["jax:cells"] for found in names.values()) == len(names) - 2
    assert {row.sweep for group in groups for row in group} == {"frontier"}
    for name in names:
        (again,) = layer.chosen_workloads(parsed(results.command_of("layer", name, "jax:cells")))
        assert again.name == name


def test_serving_is_timed_with_several_tokens_and_in_pages(folder, gpu, monkeypatch):
    rows = layer.chosen_rows(parsed("python -m benchmarks layer --serving"))
    names = {group[0].workload.T: {x.implementation.name for x in group} for group in rows}
    assert names.keys() == {1, 2, 4, 8}
    paged = {f"jax:cells-pages-{size}" for size in (16, 64, 256)}
    assert names[1] == {"jax:cells", "jax:threshold"} | paged
    assert names[8] == {"jax:cells", "jax:threshold"}
    # The same by XLA, whose steps run here: with outputs checked through the table.
    paged = layer._jax("xla-pages-64", layer.ours, "xla", page_size=64)
    monkeypatch.setitem(layer.IMPLEMENTATIONS, paged.name, paged)
    words = "--serving --workload small-grouped --implementation jax:xla jax:xla-pages-64"
    status, rows = of_layer(folder / "a.json", f"{words} --S 1024 --window 8")
    assert status == 0
    assert {(row["status"], row["sweep"]) for row in rows} == {("ok", "serving")}
    assert len(rows) == 8
    assert main(["report"]) == 0
    assert "| `xla` | 4 | pages of 64 |" in texts(folder)[1]


def test_points_of_a_frontier_are_timed_cold(folder, gpu, monkeypatch):
    monkeypatch.setattr(layer, "POINTS", layer.pools("codes", 1, 2, B=1, L=131))
    words = "--frontier --workload small-grouped --implementation jax:xla"
    status, rows = of_layer(folder / "a.json", words)
    assert status == 0
    for row in rows:
        assert (row["status"], row["sweep"]) == ("ok", "frontier")
        assert 16 <= row["cold"]["median"] <= 18
        assert "call" not in row
    assert main(["report"]) == 0
    assert "small-grouped --B 1 --L 131" not in texts(folder)[1]  # no row of other tables


def wrong_output(out, before, after):
    return out.at[-1, 0, 3].multiply(1.1), after


def nothing_written(out, before, after):
    return out, dataclasses.replace(after, value=before.value)


@pytest.mark.parametrize(
    ("wrong", "words", "reason"),
    [
        (wrong_output, "small-grouped", "batch row 1, query token 0, head 3: not attention to its"),
        (wrong_output, "layers", "batch row 1, query token 0, head 3: not attention to its list"),
        (wrong_output, POOL, "batch row 1, query token 0, head 3: not attention to its list"),
        (nothing_written, "small-grouped", "batch row 0: its new value was not written"),
        (nothing_written, "steps", "batch row 0: its new value was not written"),
    ],
)
def test_a_layer_that_is_wrong_is_not_timed(wrong, words, reason, tmp_path, monkeypatch, scans):
    right = layer_steps.decode_attention

    def attention(query, key_new, value_new, cache, config, **options):
        found = right(query, key_new, value_new, cache, config, **options)
        return wrong(found[0], cache, found[1])

    monkeypatch.setattr(layer_steps, "decode_attention", attention)
    monkeypatch.setattr(
        layer_steps.JaxLayer, "may_differ", property(lambda self: 0, lambda self, _: None)
    )
    words = f"--workload {words} --implementation jax:xla"
    status, (row,) = of_layer(tmp_path / "r.json", words)
    assert (status, row["status"]) == (1, "failed")
    assert row["reason"].startswith(f"wrong output: {reason}")


def test_full_attention_that_misses_tokens_is_not_timed(tmp_path, monkeypatch):
    full = layer_steps.jax.nn.dot_product_attention

    def shorter(*arrays, key_value_seq_lengths, **options):
        return full(*arrays, key_value_seq_lengths=key_value_seq_lengths - 9, **options)

    monkeypatch.setattr(layer_steps.jax.nn, "dot_product_attention", shorter)
    words = "--workload small-grouped --implementation jax:full-xla"
    _, (row,) = of_layer(tmp_path / "r.json", words)
    assert row["reason"].startswith("wrong output: batch row 1, query token 0, head 7: not att")


@pytest.mark.parametrize("name", ["jax:cells", "jax:threshold"])
@pytest.mark.parametrize(
    "workload",
    ["llama-128k-b4", "llama-128k-b4 --rerank 8 --estimate-rest codes", "layers-b2", "steps-b1"],
)
def test_layers_lower_for_a_gpu(name, workload, monkeypatch):
    found = []

    def lower(forms, function, arguments, *, donate=None):
        options = {"donate_argnames": donate, "keep_unused": True}
        found.append(lowered(function, *arguments, **options))

    monkeypatch.setattr(layer_steps, "Program", lower)
    (w,) = layer.chosen_workloads(parsed(results.command_of("layer", workload, name)))
    with an_h100():
        layer.IMPLEMENTATIONS[name].programs(w, Forms(None))
    # What a pool is checked by is XLA's.
    assert ["triton" in text for text in found] == [w.config.rerank == 1, True]


@pytest.mark.parametrize(
    "workload", [w.name for w in (*layer.DEFAULT, *layer.SCANS.values())] + ["llama-32k --L 1024"]
)
def test_a_layer_is_repeated_by_its_command(workload):
    again = parsed(results.command_of("layer", workload, "torch:sdpa"))
    assert [w.name for w in layer.chosen_workloads(again)] == [workload]
    assert [row.workload.name for (row,) in layer.chosen_rows(again)] == [workload]


def test_the_readmes_table_is_about_whole_layers_once_they_are_measured(folder):
    rows = [
        measure.Row(w, layer.IMPLEMENTATIONS[name], "layer", numbers={"cold": stats(us)}, done=True)
        for w in layer.DEFAULT
        for name, us in (
            ("jax:cells", 20.0),
            ("jax:threshold", 30.0),
            ("jax:full-cudnn", 500.0),
            ("torch:original", 900.0),
            ("torch:sdpa", 400.0),
        )
    ]
    gpu_results(folder)
    gpu_results(folder, kind="layer", rows=rows, file="b.json")
    assert main(["report"]) == 0
    readme, document = texts(folder)
    lines = [line for line in readme.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == list(report.LAYERS_IN_README)
    assert lines[1] == (
        "| `llama-128k-b4 --B 1`: 1 row, 128k tokens | 400 `sdpa` | 900 | 20.0 `cells` "
        "| **20.0x** | **45.0x** |"
    )
    assert lines[1] in document
    assert "| `llama-32k`: 1 row, 32k tokens | 20.0 `top_k` |" in document


# The frontier

FRONTIER = "python -m benchmarks layer --frontier"
BALANCED = {"rerank": 8, "estimate_rest": "codes"}


def timed_frontier(monkeypatch):
    """The rows of `layer --frontier`: 30 us, but 20 for one row and 500 for full attention."""
    with monkeypatch.context() as patch:
        patch.setattr(results, "has_gpu", lambda: True)
        rows = [x for group in layer.chosen_rows(parsed(FRONTIER)) for x in group]
    for row in rows:
        of_full = row.implementation.name == "jax:full-cudnn"
        us = 500.0 if of_full else 30.0 if row.workload.B == 4 else 20.0
        row.numbers, row.done = {"cold": stats(us)}, True
    return rows


def evaluated(option, divergence, budget=128, grouping="strided", **config):
    """A row of `examples.evaluate`."""
    sizes = {"num_subspaces": 2, "num_bits": 6, "heavy_size": budget, "rerank": 1}
    about = {"estimate_rest": False, "grouping": grouping, "copies": 1, "window_size": 64}
    says = {"divergence": divergence, "ratio": 1.5, "agreement": 0.75}
    return {"option": option, "budget": budget, "config": sizes | about | config, **says}


def evaluation(folder, rows, text="documentation"):
    """A results file of `examples.evaluate`; the rows of full layers are no part of a frontier."""
    rows = [row | {"text": text} for row in rows]
    rows.append(rows[0] | {"divergence": 0.0, "full_layers": [0]})
    about = {"time": "2026-01-03", "command": "python -m examples.evaluate", "commit": "fedcba"}
    about |= {"dirty": False, "machine": results.describe_machine(), "seconds": 2.0}
    about |= {"measure": "options", "model": "smollm2", "length": 8192}
    about |= {"prompt": 7168, "tokens": 1024}
    (folder / "evaluations").mkdir(exist_ok=True)
    path = folder / "evaluations" / f"gpu-frontier-{text}.json"
    path.write_text(json.dumps(about | {"rows": rows}))


def test_a_frontier_joins_times_and_what_a_model_says(folder, monkeypatch):
    gpu_results(folder, kind="layer", rows=timed_frontier(monkeypatch))
    rows = [
        evaluated("contiguous", 0.1),
        evaluated("fast", 0.4),
        evaluated("balanced", 0.02, **BALANCED),
        evaluated("rerank-4", 0.3, rerank=4, grouping="contiguous"),
        evaluated("rerank-4", 0.2, rerank=4),
        evaluated("exact", 0.03),
    ]
    evaluation(folder, rows)
    evaluation(folder, [evaluated("balanced", 0.0025, **BALANCED)], text="source")
    assert main(["report"]) == 0
    assert main(["report", "--check"]) == 0
    readme, document = texts(folder)
    lines = document.splitlines()
    for line in (
        # The recommended codebooks, else the best.
        "| 2 x 6 bits | 128 | 1 | no | 30.0 | 20.0 | 0.4 | 1.500 | 0.750 | - | - | - | fast |",
        "| 2 x 6 bits | 128 | 4 | no | 30.0 | 20.0 | 0.2 | 1.500 | 0.750 | - | - | - | - |",
        "| 2 x 6 bits | 128 | 8 | codes | 30.0 | 20.0 | 0.02 | 1.500 | 0.750 | 0.0025 | 1.500 "
        "| 0.750 | balanced |",
        "| 2 x 6 bits | 64 | 8 | codes | 30.0 | - | - | - | - | - | - | - | - |",
        "| exact top-k | 128 | - | - | - | - | 0.03 | 1.500 | 0.750 | - | - | - | - |",
        "| full attention | - | - | - | 500 | 500 | - | - | - | - | - | - | - |",
        "| 4 | mean | 20.0 | 20.0 | 20.0 |",
    ):
        assert line in lines
    for line in (
        "| `fast` | 0.4 | - | 30.0 | 20.0 |",
        "| `balanced` | 0.02 | 0.0025 | 30.0 | 20.0 |",
        "| `near-exact` | - | - | - | - |",
        "| exact top-k of 128 | 0.03 | - | - | - |",
        "| full attention | - | - | 500 | 500 |",
    ):
        assert line in readme.splitlines()
    assert "older" not in readme
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert document.count("(frontier.png)") == 1
    assert "](../../examples/results/gpu-frontier-source.json)" in document


def test_a_frontier_without_a_model_is_a_table_of_times(folder, monkeypatch):
    gpu_results(folder, kind="layer", rows=timed_frontier(monkeypatch))
    assert main(["report"]) == 0
    readme, document = texts(folder)
    assert "| 2 x 6 bits | 128 | 1 | no | 30.0 | 20.0 |" in document.splitlines()
    assert "older" in readme
    assert not (folder / "frontier.png").exists()


def test_points_that_differ_in_one_thing_are_a_line(monkeypatch, folder):
    gpu_results(folder, kind="layer", rows=timed_frontier(monkeypatch))
    times = frontier.times_of(results.load([folder / "a.json"]))
    found = [frontier.Point(config, 1.0, 0.5) for config in times[4, 2**17] if config]
    sizes = {name: len(line) for name, line in frontier.families(found).items()}
    assert sizes == {
        "no rest": 6,
        frontier.OTHER_BUDGETS: 4,
        "rest by codes": 6,
        "rest by mean": 3,
        "2 x 5 bits, rest by codes": 2,
        "4 x 3 bits, rest by codes": 2,
    }


def test_an_evaluation_without_configs_is_named(folder, monkeypatch, capsys):
    gpu_results(folder, kind="layer", rows=timed_frontier(monkeypatch))
    evaluation(folder, [{"option": "fast", "budget": 128, "divergence": 0.5}])
    assert main(["report"]) == 1
    assert "gpu-frontier-documentation.json: expected an eval" in capsys.readouterr().out


# build and decode


def test_a_build_is_checked_timed_and_reported(folder, gpu, monkeypatch):
    small = dataclasses.replace(SMALL["small"], name="seed", L=64, S=None)
    monkeypatch.setitem(build.WORKLOADS, "seed", small)
    argv = ["build", "--workload", "seed", "--tokens", "128", "--quick"]
    assert main([*argv, "--output", str(folder / "build.json")]) == 0
    ours, *ahead, original = rows_of(folder / "build.json")
    assert len(ahead) == 2
    for row in (ours, *ahead, original):
        assert (row["workload"], row["status"]) == ("seed --tokens 128", "ok")
        assert row["warm"]["count"] == row["call"]["count"] == build.QUICK.calls
        assert 0 < row["error"] < 1
    assert ours["error"] == pytest.approx(original["error"], rel=0.3)  # other random starts
    assert ours["memory_bytes"] > 0
    assert main(["report"]) == 0
    _, document = texts(folder)
    assert "| `seed --tokens 128` | `torch:indexer_first` |" in document
    assert document.count("\npython -m benchmarks build --workload seed --tokens 128\n") == 1


def test_codes_that_are_not_the_nearest_fail_a_build():
    prompt = build.Prompt.of(dataclasses.replace(SMALL["small"], L=128, S=None))
    codebooks = np.random.default_rng(0).standard_normal((4, 2, 16, 8), np.float32)
    sample = np.asarray(prompt.key[:1, prompt.sample])
    codes = build.oracle.encode(sample, codebooks[None])[0][0]

    class Given(build.Build):
        def trained(self):
            return codebooks, codes

    given = Given(prompt)
    given.check(prompt)
    assert 0 < given.numbers["error"] < 1
    codes[3, 1, 7] ^= 1
    with pytest.raises(AssertionError, match="kv head 3, subspace 1, token"):
        given.check(prompt)


def test_a_decode_goes_on_until_a_segment_is_sealed(folder, gpu, monkeypatch):
    """On XLA, which keeps the state too, with a clock that makes times up."""
    small_sealing = functools.partial(
        state.sealing_for, smallest_segment=16, smallest_block=64, most_moves=4
    )
    for module in (cells, decode):
        monkeypatch.setattr(module, "sealing_for", small_sealing)
    monkeypatch.setattr(decode, "SELECTOR", None)
    monkeypatch.setattr(decode, "CHECKED_BY", None)
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
    assert main(["decode", "--workload", "seed", "wide", "seed", "--output", str(output)]) == 0
    first, second = rows_of(output)
    assert (first["status"], first["segment"]) == ("ok", 64)
    assert (second["workload"], second["status"]) == ("wide", "ok")
    assert first["warm"]["count"] == first["steps"] == 64 + 2 + 16 + 2
    assert sealed == [[[178, 178], [242, 242]], [[178], [242]]]
    assert main(["report"]) == 0
    assert "| `seed` | 84 | 64 |" in texts(folder)[1]


def test_the_readme_shows_the_committed_results(capsys):
    status = main(["report", "--check"])
    assert status == 0, capsys.readouterr().out


@pytest.mark.gpu
def test_the_pipeline_beats_iteration_4_on_the_seeds_workload(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "has_gpu", HAS_GPU)
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
