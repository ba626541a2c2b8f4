"""The README's example runs as pasted."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_as_pasted(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    scope = {}
    exec(compile(example, README.name, "exec"), scope)
    assert (
        capsys.readouterr().out == f"{scope['selection'].indices.shape} [64 64 64 64 64 64 64 64]\n"
    )
    assert scope["out"].shape == (1, 1, 8, 64)
    assert scope["index"].lengths.tolist() == [4001]


def test_the_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (README.parent / path).is_file(), path
