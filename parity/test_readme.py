"""The README's examples run as pasted, one after the other."""

import re
import shlex
from pathlib import Path

import jax
import numpy as np

from benchmarks import layer, run
from benchmarks.__main__ import make_parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_examples_run_as_pasted(capsys):
    found = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    decode, serve, drafts, parts, million, devices = found
    scope = {}
    exec(compile(decode, README.name, "exec"), scope)
    assert scope["cache"].index.lengths.tolist() == [[3008], [3008]]
    assert np.isfinite(scope["query"]).all()
    exec(compile(serve, README.name, "exec"), scope)
    assert scope["cache"].index.lengths.tolist() == [[3000], [0]]
    assert scope["drifted"].tolist() == [False]
    exec(compile(drafts, README.name, "exec"), scope)
    assert scope["paged"].index.lengths.tolist() == [3001]
    assert scope["paged"].index.high_water.tolist() == [3004]
    assert scope["out"].shape == (1, 4, 8, 64)
    exec(compile(parts, README.name, "exec"), scope)
    shape = scope["selection"].indices.shape
    assert capsys.readouterr().out == f"{shape} [64 64 64 64 64 64 64 64]\n"
    assert scope["out"].shape == (1, 1, 8, 64)
    assert scope["index"].lengths.tolist() == [4001]
    exec(compile(million, README.name, "exec"), scope)
    assert scope["far"].index.lengths.tolist() == [3001]
    exec(compile(devices, README.name, "exec"), scope)
    assert scope["parts"].lengths.tolist() == [4001] * jax.device_count()
    assert scope["selection"].counts.shape == (jax.device_count(), 1, 8)
    assert scope["cache"].index.lengths.tolist() == [4001]
    assert np.isfinite(scope["out"].astype(np.float32)).all()


def test_it_is_short():
    assert len(README.read_bytes()) <= 12 * 1024


def test_the_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (README.parent / path).is_file(), path


def test_the_benchmark_commands_can_be_pasted():
    texts = [
        ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/results/REPORT.md")
    ]
    found = [re.findall(r"python -m (benchmarks\b[^`\n]*)", path.read_text()) for path in texts]
    assert all(found)
    parser = make_parser()
    for command in {command for commands in found for command in commands}:
        program, *words = shlex.split(command)
        assert program == "benchmarks"
        arguments = parser.parse_args(words)
        if arguments.command == "run":
            assert run.chosen_points(arguments)
            assert run.chosen_implementations(arguments)
        if arguments.command == "layer":
            assert list(layer.chosen_rows(arguments))
