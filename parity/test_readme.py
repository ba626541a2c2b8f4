"""The README's examples run as pasted, one after the other."""

import argparse
import re
import shlex
from pathlib import Path

from benchmarks import choice

README = Path(__file__).parents[1] / "README.md"


def test_the_examples_run_as_pasted(capsys):
    decode, serve = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    scope = {}
    exec(compile(decode, README.name, "exec"), scope)
    assert (
        capsys.readouterr().out == f"{scope['selection'].indices.shape} [64 64 64 64 64 64 64 64]\n"
    )
    assert scope["out"].shape == (1, 1, 8, 64)
    assert scope["index"].lengths.tolist() == [4001]
    exec(compile(serve, README.name, "exec"), scope)
    assert scope["index"].lengths.tolist() == [3000]
    assert scope["drifted"].tolist() == [False]


def test_the_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (README.parent / path).is_file(), path


def test_the_benchmark_commands_can_be_pasted():
    parser = argparse.ArgumentParser()
    choice.add_arguments(parser)
    commands = re.findall(
        r"^(?:\| `)?python -m benchmarks run(.*?)(?:`|$)", README.read_text(), re.M
    )
    assert len(commands) > 5
    for command in commands:
        arguments = parser.parse_args(shlex.split(command))
        assert choice.chosen_points(arguments)
        assert choice.chosen_implementations(arguments, gpu=True)
