"""JAX programs: traced one after another from shapes alone, compiled side by side in threads."""

import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

# XLA records kernels as CUDA graphs, and CUPTI gives kernels in them the names of others. What is
# recorded kernel by kernel is therefore the same program without.
NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}


@dataclasses.dataclass(frozen=True)
class Forms:
    """Which forms of its programs a run needs.

    Attributes:
      pool: threads to compile in; XLA holds no lock of Python's meanwhile.
      user: as a user gets them.
      recorded: without command buffers.
      chains: chains of steps too.
    """

    pool: ThreadPoolExecutor
    user: bool = True
    recorded: bool = False
    chains: bool = False


class Program:
    """A jitted function that is compiled for one set of shapes, in one form or in two.

    Attributes:
      as_user: calls the program as a user gets it.
    """

    def __init__(
        self,
        forms: Forms,
        function: Callable[..., Any],
        arguments: tuple,
        *,
        donate: str | None = None,
    ):
        """Traces a function; a thread compiles it.

        Args:
          forms: which forms are wanted.
          function: to be jitted.
          arguments: arrays or their shapes.
          donate: the name of an argument.
        """
        # A donated array that the function only replaces stays where it is: without it, another
        # output would take its memory, and be copied there.
        self.as_user = jax.jit(function, donate_argnames=donate, keep_unused=True)
        start = time.perf_counter()
        lowered = self.as_user.lower(*arguments)
        self._tracing = time.perf_counter() - start
        self._future: Future = forms.pool.submit(_compiled, lowered, forms)

    def wait(self) -> None:
        """Blocks until it is compiled; raises what went wrong."""
        self._future.result()

    @property
    def recorded(self) -> Callable[..., Any]:
        """Calls the program without command buffers, where there is such a form."""
        return self._future.result().recorded or self.as_user

    @property
    def seconds(self) -> float:
        """Time to trace and compile one form, beside others that were compiled."""
        return self._tracing + self._future.result().seconds

    @property
    def memory_bytes(self) -> int | None:
        """Device memory that a call needs beside its inputs, at most; None if not known."""
        compiled = self._future.result()
        memory = (compiled.user or compiled.recorded).memory_analysis()
        if not memory:
            return None
        return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


@dataclasses.dataclass
class _Compiled:
    """The forms of a program, and how long the first of them took."""

    user: jax.stages.Compiled | None = None
    recorded: jax.stages.Compiled | None = None
    seconds: float = 0.0


def _compiled(lowered: jax.stages.Lowered, forms: Forms) -> _Compiled:
    found = _Compiled()
    start = time.perf_counter()
    if forms.user:  # JAX keeps it, and finds it when the jitted function is called.
        found.user = lowered.compile()
        found.seconds = time.perf_counter() - start
    if forms.recorded:
        found.recorded = lowered.compile(NO_COMMAND_BUFFERS)
        found.seconds = found.seconds or time.perf_counter() - start
    return found


def compilers() -> ThreadPoolExecutor:
    """A thread for each core."""
    return ThreadPoolExecutor(os.cpu_count())
