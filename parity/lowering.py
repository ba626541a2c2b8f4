"""Lowering for an H100 that is not there."""

import contextlib
from unittest import mock

import jax
from jax.sharding import AbstractMesh, AxisType

from jax_indexer.kernels import backend

H100 = "NVIDIA H100 80GB HBM3"


@contextlib.contextmanager
def an_h100(sizes=(), names=()):
    """The mesh under which JAX 0.11 lowers for a GPU it does not have; 0.10 needs none."""
    axis_types = (AxisType.Auto,) * len(sizes)
    with mock.patch.object(backend, "no_gpu", return_value=None):
        if jax.__version_info__ < (0, 11):
            yield AbstractMesh(sizes, names, axis_types=axis_types)
            return
        device = jax.sharding.AbstractDevice(H100, num_cores=132, platform="cuda")
        mesh = AbstractMesh(sizes, names, axis_types=axis_types, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            yield mesh


def lowered(function, *args, **jit_options) -> str:
    """The program for CUDA, without what is only there for other platforms."""
    traced = jax.jit(function, **jit_options).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).as_text()
