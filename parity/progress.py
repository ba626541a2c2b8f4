"""A progress bar for programs that take minutes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call with the name of each of `total` steps; lines where rich is missing."""
    try:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
    except ImportError:
        started, done = time.perf_counter(), 0

        def say(what: str) -> None:
            nonlocal done
            done += 1
            print(f"[{done}/{total}, {time.perf_counter() - started:.0f} s] {what}", flush=True)

        yield say
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what: bar.update(task, advance=1, description=what)
