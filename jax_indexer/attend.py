"""sparse_attention: the consumer of the lists."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jax_indexer import _arguments, reference
from jax_indexer.config import Implementation
from jax_indexer.layout import KVLayout
from jax_indexer.state import Selection


def sparse_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B _ _ H"],
    value: Float[Array, "B _ _ H'"],
    selection: Selection,
    *,
    scale: float | Array | None = None,
    kv_layout: KVLayout = "BSKH",
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H'"]:
    """Softmax attention of every query head over the tokens listed for it.

    Args:
      query: [B, T, N, H], float32, bfloat16 or float16.
      key: [B, S, K, H] ("BSKH") or [B, K, S, H] ("BKSH"), the cache.
      value: like `key`, but with a head dimension H' of its own.
      selection: what `select` returned for an index of the cache's capacity S; only its indices
        are read.
      scale: of the logits; None for H**-0.5.
      kv_layout: order of the token and head axes of `key` and `value`.
      implementation: "xla", or None for the best one there is.

    Returns:
      [B, T, N, H'] in the query's dtype, computed in float32; zeros where nothing is listed.
      Gradients flow to query, key and value, whose gradients are 0 at tokens that are not listed.

    Raises:
      ValueError: for arguments of wrong type, shape or dtype.
      NotImplementedError: for an implementation that is not there.

    Source: CONTRACT.md, section 4.
    """
    _arguments.check_choice("implementation", implementation, (None, *get_args(Implementation)))
    if implementation == "triton":
        raise NotImplementedError('implementation: sparse_attention has "xla" only; use None')
    sizes = _arguments.Sizes()
    _arguments.check_key("key", key, "S", kv_layout, sizes)
    _arguments.check_array("query", query, _arguments.QUERY, sizes)
    _arguments.check_groups(sizes)
    _arguments.check_selection(selection, sizes)
    _arguments.check_key("value", value, "S", kv_layout, sizes, head="H'")
    if scale is None:
        scale = sizes["H"] ** -0.5
    elif isinstance(scale, bool):
        raise ValueError(f"scale: expected a real number, got {scale}; pass a float or None")
    elif isinstance(scale, float) or (isinstance(scale, int) and abs(scale) < 2**31):
        scale = float(scale)
    elif jnp.ndim(scale) or not jnp.issubdtype(getattr(scale, "dtype", bool), jnp.floating):
        raise ValueError(f"scale: expected a real number, got {scale!r}; pass a float or None")
    return _attend(query, key, value, selection.indices, jax.device_put(scale), kv_layout=kv_layout)


@functools.partial(jax.jit, static_argnames=("kv_layout",))
def _attend(query, key, value, indices, scale, *, kv_layout: KVLayout) -> Array:
    scale = jnp.asarray(scale, jnp.float32)
    return reference.attend(query, key, value, indices, scale, kv_layout)
