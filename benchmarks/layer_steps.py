"""Whole layers of JAX and PyTorch on the same inputs, and the check of what comes out of them."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import jax_steps, torch_steps
from benchmarks.clock import Step, synchronised
from benchmarks.jax_steps import Forms, Program, Programs, config_for
from jax_indexer import (
    DecodeCache,
    IndexerConfig,
    PQIndex,
    decode_attention,
    reference,
    select,
    sparse_attention,
    with_cells,
)
from jax_indexer.state import ValueSums
from jax_indexer.values import add_values, no_values
from parity.agreement import Lists, Reference, check_lists
from parity.inputs import Workload, make_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWorkload(Workload):
    """A layer's step, a scan over stacked layers, or one over a layer's steps, one token each.

    Attributes:
      layers: how many are stacked, or None.
      steps: how many; L is what a row has after the last.
    """

    layers: int | None = None
    steps: int = 1

    @property
    def count(self) -> int:
        """Layers that a call runs through, one after the other."""
        return self.layers or self.steps

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """[B, S, K, H], with an axis of stacked layers before."""
        layers = () if self.layers is None else (self.layers,)
        return (*layers, self.B, self.capacity, self.K, self.H)


# Inputs

DRAWN_AT_ONCE = 4096  # tokens: their random bits take more memory than they


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def drawn(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers of shape [..., S, K, H]."""
    *rows, capacity, kv_heads, head_dim = shape
    tokens = math.gcd(capacity, DRAWN_AT_ONCE)
    keys = jax.random.split(jax.random.key(seed), math.prod(rows) * capacity // tokens)
    draw = lambda key: jax.random.normal(key, (tokens, kv_heads, head_dim), dtype)  # noqa: E731
    return lax.map(draw, keys).reshape(shape)


class Layer:
    """What implementations of a workload share: its inputs, and a pair of caches a framework.

    Attributes:
      separate: whether stacked layers have an array each.
    """

    separate = False

    def __init__(self, workload: LayerWorkload):
        self.workload, self.inputs = workload, make_inputs(workload)
        self._caches: Sequence[Any] = ()
        self._started = 0

    @property
    def caches(self) -> Sequence[Any]:
        """Keys and values [B, S, K, H], stacked ones [layers, B, S, K, H].

        Calls use them up and put others here; those of a call that failed are drawn anew.
        """
        if not self._caches or any(x.is_deleted() for x in jax.tree.leaves(self._caches)):
            self._caches = ()  # frees what is left of them
            self._caches = [self._draw(seed) for seed in (2**20, 2**21)]
        return self._caches

    @caches.setter
    def caches(self, caches: Sequence[Any]) -> None:
        self._caches = caches

    def _draw(self, seed: int) -> Any:
        shape, dtype = self.workload.cache_shape, jnp.dtype(self.workload.dtype)
        if self.separate:
            return tuple(drawn(seed + i, shape[1:], dtype) for i in range(shape[0]))
        return drawn(seed, shape, dtype)

    @functools.cached_property
    def torch_caches(self) -> Sequence[Any]:
        """The same in PyTorch's order, [B, K, S, H]."""
        import torch

        there = [torch.from_dlpack(jax.block_until_ready(cache)) for cache in self.caches]
        order = torch.contiguous_format
        copies = [x.transpose(1, 2).clone(memory_format=order) for x in there]
        torch_steps.synchronize()
        return copies

    def new_tokens(self) -> Sequence[np.ndarray]:
        """Keys and values [count, B, T, K, H] to write; each implementation gets others."""
        self._started += 1
        w, rng = self.workload, np.random.default_rng((self.workload.seed, self._started))
        shape = w.count, *self.inputs.key_new.shape
        return [rng.standard_normal(shape, np.float32).astype(w.dtype) for _ in range(2)]

    @functools.cached_property
    def _scores(self) -> Reference:
        return Reference(self.workload, self.inputs)

    def scores(self, query: np.ndarray) -> Reference:
        """Exact scores of a query; the new tokens lie in the window, where scores do not count."""
        if query is self.inputs.query:
            return self._scores
        return Reference(self.workload, dataclasses.replace(self.inputs, query=query))


# The check


def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Attention of queries [n, H] to what is listed [n, P] of float32 keys and values [n, P, H]."""
    logits = (key @ query.astype(np.float32)[..., None])[..., 0].astype(np.float64)
    logits = np.where(listed, logits * query.shape[-1] ** -0.5, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return (weights.astype(np.float32)[:, None] @ value)[:, 0]


class LayerStep(Step):
    """A layer whose output is attention to its lists, or to all tokens where it has none.

    Attributes:
      layer: its inputs.
      new: keys and values [count, B, T, K, H] that it writes, or None.
      may_differ: heads that may have other lists than `lists` says.
    """

    layer: Layer
    new: Sequence[np.ndarray] | None
    may_differ = 0

    def query(self) -> np.ndarray:
        """What the last layer attended with, [B, T, N, H]."""
        return self.layer.inputs.query

    def output(self) -> np.ndarray:
        """What came out of it, [B, T, N, H] in float32."""
        raise NotImplementedError

    def tokens(self, *place: np.ndarray) -> Sequence[np.ndarray]:
        """Float32 keys and values [..., H] in its caches, at batch rows, positions and kv heads."""
        raise NotImplementedError

    def lists(self) -> Callable[[int], Lists] | None:
        """What gives the lists of a batch row."""
        return None

    def wanted(self) -> np.ndarray | None:
        """What should come out where lists alone do not say it, [B, T, N, H] in float32."""
        return None

    def check(self, reference: Layer):
        """Raises AssertionError unless tokens were written, lists are right, and so is the output.

        Of full attention one head is looked at.
        """
        w, query, lists, out = reference.workload, self.query(), self.lists(), self.output()
        of_pool = self.wanted()
        if self.new is not None:
            self._check_written(w)
        if lists is not None:
            check_lists(reference.scores(query), lists)
        wrong = []
        for b, t in np.ndindex(w.B, w.T):
            if of_pool is not None:
                heads, wanted = np.arange(w.N), of_pool[b, t]
                wrong += self._far(w, out[b, t], wanted, heads, b, t)
                continue
            if lists is not None:
                heads, places = np.arange(w.N), lists(b).indices[t]
            elif (b, t) == (w.B - 1, w.T - 1):
                heads, places = np.array([w.N - 1]), np.arange(w.lengths[b])[None]
            else:
                continue
            kv_heads = np.broadcast_to((heads // (w.N // w.K))[:, None], places.shape)
            vectors = self.tokens(np.full_like(places, b), np.maximum(places, 0), kv_heads)
            wanted = exact(query[b, t, heads], *vectors, places >= 0)
            wrong += self._far(w, out[b, t, heads], wanted, heads, b, t)
        if len(wrong) > self.may_differ:
            raise AssertionError(f"{wrong[0]}: not attention to its list, as {len(wrong)} in all")

    @staticmethod
    def _far(
        w: LayerWorkload, out: np.ndarray, wanted: np.ndarray, heads: np.ndarray, b: int, t: int
    ) -> list[str]:
        """The heads whose output is another: weights and output may be rounded to the dtype."""
        share = np.linalg.norm(out - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        far = heads[~(share <= max(2 * float(jnp.finfo(w.dtype).eps), 1e-5))]  # or it is NaN
        return [f"batch row {b}, query token {t}, head {n}" for n in far]

    def _check_written(self, w: LayerWorkload) -> None:
        ends = np.asarray(w.lengths)[:, None, None]
        b, t, kv_head = np.mgrid[: w.B, : w.T, : w.K]
        there = self.tokens(b, ends - w.T + t, kv_head)
        for name, found, new in zip(("key", "value"), there, self.new, strict=True):
            if len(wrong := np.argwhere((found != new[-1].astype(np.float32)).any(axis=-1))):
                raise AssertionError(f"batch row {wrong[0][0]}: its new {name} was not written")


# Ours, and JAX's full attention: (query, keys, values, caches, layer) -> output, caches


class Caches(NamedTuple):
    """Keys and values, of all layers if there are some, and an index, or lengths for want of one.

    Layers that are not stacked have an array each, in tuples.
    """

    key: Any
    value: Any
    index: Any


def ours(config: Any, *, table: np.ndarray | None = None, **options: Any) -> Callable[..., Any]:
    """`decode_attention`; with a table the same memory is taken for pages."""

    def attend(query, key_new, value_new, caches, layer):
        rows, of_pages = caches.key.shape, {}
        if table is not None:
            pages = *rows[:-4], table.size, -1, *rows[-2:]
            caches = caches._replace(
                key=caches.key.reshape(pages), value=caches.value.reshape(pages)
            )
            of_pages["page_table"] = jnp.asarray(table)
        step = query, key_new, value_new, DecodeCache(*caches), config
        out, cache = decode_attention(*step, layer=layer, **of_pages, **options)
        return out, Caches(cache.key.reshape(rows), cache.value.reshape(rows), cache.index)

    return attend


def random_pages(w: LayerWorkload, page_size: int | None) -> np.ndarray | None:
    """A table [B, pages of a row] of all pages in random order; None for rows."""
    if page_size is None:
        return None
    shape = w.B, w.capacity // page_size
    rng = np.random.default_rng(w.seed)
    return rng.permutation(math.prod(shape)).astype(np.int32).reshape(shape)


def full(config: Any, *, implementation: str) -> Callable[..., Any]:
    """`jax.nn.dot_product_attention` of one token, in a layer with arrays of its own."""

    def attend(query, key_new, value_new, caches, layer):
        assert layer is None
        lengths = caches.index
        place, write = (np.arange(len(query)), lengths), {"mode": "drop", "unique_indices": True}
        key = caches.key.at[place].set(key_new[:, 0], **write)
        value = caches.value.at[place].set(value_new[:, 0], **write)
        options = {"key_value_seq_lengths": lengths + 1, "implementation": implementation}
        with jax.numpy_dtype_promotion("standard"):  # which it needs
            out = jax.nn.dot_product_attention(query, key, value, **options)
        return out, Caches(key, value, lengths + 1)

    return attend


def call_of(attend: Callable[..., Any], w: LayerWorkload, unrolled: bool) -> Callable[..., Any]:
    """One call, for all layers or steps: outputs [count, B, T, N, H], and caches."""

    def call(query, keys_new, values_new, lengths, caches):
        # What a call begins with has the lengths that the one before left.
        has_index = not isinstance(caches.index, jax.Array)
        index = dataclasses.replace(caches.index, lengths=lengths) if has_index else lengths
        caches, news = caches._replace(index=index), (keys_new, values_new)

        def next_layer(carry, x):
            query, caches = carry
            number, *new = x
            out, caches = attend(query, *new, caches, number if w.layers else None)
            out = lax.optimization_barrier(out)  # or XLA adds it to the query without rounding it
            return (query + out, caches), out

        if unrolled:
            outs, left = [], []
            for *new, key, value in zip(*news, caches.key, caches.value, strict=True):
                out, one = attend(query, *new, Caches(key, value, index), None)
                query = query + (out := lax.optimization_barrier(out))
                outs, left = [*outs, out], [*left, one[:2]]
            return jnp.stack(outs), Caches(*zip(*left, strict=True), index)
        if w.count > 1:
            steps = jnp.arange(w.count), *news
            (_, caches), outs = lax.scan(next_layer, (query, caches), steps, unroll=2)
            return outs, caches
        out, caches = attend(query, *(new[0] for new in news), caches, None)
        return out[None], caches

    return call


def stacked(tree: Any, layers: int | None) -> Any:
    """A tree of arrays, the same for each layer if there are some."""
    return jax.tree.map(lambda x: jnp.repeat(x[None], layers, 0), tree) if layers else tree


def layer_programs(
    w: LayerWorkload,
    forms: Forms,
    *,
    make: Any,
    selector: str | None,
    unrolled: bool,
    page_size: int | None = None,
    **options: Any,
) -> Programs:
    """A call with its caches donated, and what it is checked by.

    That is what selects the last lists again, or, where lists are not all, XLA's own attention.
    """
    config = config_for(w, selector)
    query, key_new, lengths, index = jax_steps.shapes_of(w, config)
    if config.estimate_rest:
        values = jax.eval_shape(lambda: no_values(w.B, w.K, w.H, config))
        index = dataclasses.replace(index, values=values, high_water=index.lengths)
    programs = {}
    if make is ours:
        options["selector"] = selector
        once = forms._replace(user=True, recorded=False)
        if config.rerank > 1 or config.estimate_rest:
            one = jax.ShapeDtypeStruct(w.cache_shape[-4:], key_new.dtype)
            again = functools.partial(attention_by_xla, config=config)
            programs["attend"] = Program(once, again, (query, reference.Caches(one, one), index))
        else:
            again = lambda query, index: select(query, index, config, **options)  # noqa: E731
            programs["select"] = Program(once, again, (query, index))
        index, lengths = jax.eval_shape(lambda tree: stacked(tree, w.layers), (index, lengths))
    else:
        index = lengths
    cache = jax.ShapeDtypeStruct(w.cache_shape[unrolled:], key_new.dtype)
    cache = (cache,) * w.count if unrolled else cache
    new = jax.ShapeDtypeStruct((w.count, *key_new.shape), key_new.dtype)
    arguments = query, new, new, lengths, Caches(cache, cache, index)
    if page_size is not None:
        options["table"] = random_pages(w, page_size)
    call = call_of(make(config, **options), w, unrolled)
    step = Program(forms, call, arguments, donate="caches")
    return {"step": step, **programs}


def attention_by_xla(
    query: jax.Array, caches: reference.Caches, index: PQIndex, *, config: IndexerConfig
) -> jax.Array:
    """Attention of a layer's last step, in float32."""
    logits = reference.Logits(jnp.float32(query.shape[-1] ** -0.5), None)
    out = reference.attend_selected(query, caches, index, None, logits, config, "BSKH", None)
    return out.astype(jnp.float32)


@jax.jit
def gathered(cache: jax.Array, place: tuple[jax.Array, ...]) -> jax.Array:
    """Vectors of a cache, in float32."""
    return cache[place].astype(jnp.float32)


class JaxLayer(LayerStep):
    """Layers under jit, with their caches donated."""

    def __init__(
        self,
        layer: Layer,
        programs: Programs,
        selector: str | None,
        unrolled: bool,
        page_size: int | None = None,
    ):
        w, inputs = layer.workload, layer.inputs
        self.layer, layer.separate, self._programs = layer, unrolled, programs
        self._table, self._page_size = random_pages(w, page_size), page_size
        self.new = layer.new_tokens()
        self.numbers = programs["step"].numbers
        has_index = bool(programs.keys() & {"select", "attend"})
        if has_index and not selector:
            # XLA may round a table otherwise in a larger program, and cut a few lists otherwise.
            self.may_differ = inputs.query[..., 0].size // 10
        lengths = jnp.asarray(inputs.lengths - np.int32(w.T * w.steps))
        index = jnp.copy(lengths)  # donated, unlike what each call begins with
        if has_index:
            config = config_for(w, selector)
            index = dataclasses.replace(jax_steps.index_of(inputs), lengths=index)
            index = with_cells(index, config) if config.cells else index
            if config.estimate_rest:
                sums, lengths_of = self._sums(index, config), jnp.copy(lengths)
                index = dataclasses.replace(index, values=sums, high_water=lengths_of)
            index, lengths = stacked((index, lengths), w.layers)
        self._index, self._query = index, jnp.asarray(inputs.query)
        self._arguments = self._query, *map(jnp.asarray, self.new), lengths

    def _launch(self, function: Callable[..., Any]) -> None:
        caches = Caches(*self.layer.caches, self._index)
        self._outs, (*self.layer.caches, self._index) = function(*self._arguments, caches)

    def call(self):
        self._launch(self._programs["step"].as_user)

    def call_recorded(self):
        self._launch(self._programs["step"].recorded)

    def wait(self):
        jax.block_until_ready(self._outs)

    def query(self):
        query = self.layer.inputs.query
        for out in np.asarray(self._outs[:-1]):
            query = query + out
        return query

    def output(self):
        return np.asarray(self._outs[-1].astype(jnp.float32))

    def tokens(self, *place):
        caches = self.layer.caches
        if self._table is not None:
            b, s, kv_head = place
            slot = self._table[b, s // self._page_size] * self._page_size + s % self._page_size
            place = *np.divmod(slot, self.layer.workload.capacity), kv_head
        if self.layer.separate:
            caches = [cache[-1] for cache in caches]
        elif layers := self.layer.workload.layers:
            place = np.full_like(place[0], layers - 1), *place
        return [np.asarray(gathered(cache, place)) for cache in caches]

    def _sums(self, index: PQIndex, config: IndexerConfig) -> ValueSums | None:
        """Sums of the values of the last layer, if there is a rest."""
        if not config.estimate_rest:
            return None
        w, value = self.layer.workload, self._last(self.layer.caches[1])
        empty, nothing = no_values(w.B, w.K, w.H, config), jnp.zeros(w.B, jnp.int32)
        grown = nothing, index.lengths, w.capacity
        return add_values(empty, value, index.codes, *grown, config, "BSKH", None)

    def _last(self, tree: Any) -> Any:
        """What the last layer has."""
        return jax.tree.map(lambda x: x[-1], tree) if self.layer.workload.layers else tree

    def wanted(self):
        if "attend" not in self._programs:
            return None
        caches = reference.Caches(*(self._last(x) for x in self.layer.caches))
        query, index = jnp.asarray(self.query()), self._last(self._index)
        return np.asarray(self._programs["attend"].as_user(query, caches, index))

    def lists(self):
        if "select" not in self._programs:
            return None
        last = self._last(self._index)
        found = self._programs["select"].as_user(jnp.asarray(self.query()), last)
        indices, counts = np.asarray(found.indices), np.asarray(found.counts)
        return lambda b: Lists(indices=indices[b], counts=counts[b], weights=None)


def attention_programs(w: LayerWorkload, forms: Forms) -> Programs:
    """`sparse_attention` alone, and what selects."""
    query, _, _, index = jax_steps.shapes_of(w, w.config)
    cache = jax.ShapeDtypeStruct(w.cache_shape, query.dtype)
    again = lambda query, index: select(query, index, w.config)  # noqa: E731
    selection = jax.eval_shape(again, query, index)
    once = forms._replace(user=True, recorded=False)

    def attend(*arguments):
        return sparse_attention(*arguments, config=w.config)[None]

    return {
        "step": Program(forms, attend, (query, cache, cache, selection)),
        "select": Program(once, again, (query, index)),
    }


class JaxAttention(JaxLayer):
    """`sparse_attention` alone, the lists given."""

    def __init__(self, layer: Layer, programs: Programs):
        super().__init__(layer, programs, None, False)
        self.new, self.may_differ = None, 0
        lengths = jnp.asarray(layer.inputs.lengths)
        self._index = dataclasses.replace(self._index, lengths=lengths)
        self._selection = programs["select"].as_user(self._query, self._index)

    def _launch(self, function):
        self._outs = function(self._query, *self.layer.caches, self._selection)


# PyTorch: the original, and full attention


class TorchLayer(LayerStep):
    """A layer, called for rows of one length at a time."""

    def __init__(self, layer: Layer):
        w, caches, self.layer = layer.workload, layer.torch_caches, layer
        self.new = layer.new_tokens()
        self._calls, self._values, self._writes = torch_steps.calls_of(layer, caches[0]), [], []
        for call in self._calls:
            rows, length = slice(call.rows.start, call.rows.stop), w.lengths[call.rows.start]
            self._values.append(caches[1][rows, :, :length])
            for cache, new in zip(caches, self.new, strict=True):
                place = cache[rows, :, length - w.T : length]
                self._writes.append((place, torch_steps.tensor(new[0, rows].transpose(0, 2, 1, 3))))
        self.numbers = {}
        self.prepare()
        self.numbers |= torch_steps.first_calls(self)

    def prepare(self) -> None:
        """What comes before the first call."""

    def attend(self, call: torch_steps.Call, values: Any) -> tuple[Any, ...]:
        """The output [b, h, 1, d] of some rows, and their lists and lengths, if there are any."""
        raise NotImplementedError

    def call(self):
        for place, new in self._writes:
            place.copy_(new)
        both = zip(self._calls, self._values, strict=True)
        self._results = [self.attend(*one) for one in both]

    def wait(self):
        torch_steps.synchronize()

    def output(self):
        outs = [out.float().cpu().numpy().transpose(0, 2, 1, 3) for out, *_ in self._results]
        return np.concatenate(outs)

    def tokens(self, *place):
        b, position, kv_head = (torch_steps.tensor(x.astype(np.int64)) for x in place)
        caches = self.layer.torch_caches
        return [cache[b, kv_head, position].float().cpu().numpy() for cache in caches]

    def lists(self):
        found = [lists for _, *lists in self._results]
        return functools.partial(torch_steps.lists_of, self._calls, found) if found[0] else None


class Original(TorchLayer):
    """The original's indexer, and its attention to the lists."""

    def select(self, call: torch_steps.Call) -> tuple[Any, ...]:
        """Lists and their lengths."""
        import torch_reference

        return torch_reference.ITERATIONS["iteration4"](*call.arguments, **call.options)[:2]

    def attend(self, call, values):
        import torch_reference

        (query, keys, *_), lists = call.arguments, self.select(call)
        return torch_reference.sparse_attention(query, keys, values, *lists), *lists


class OriginalAttention(Original):
    """The original's attention alone, the lists given."""

    def prepare(self):
        given = {call.rows: self.select(call) for call in self._calls}
        self.select = lambda call: given[call.rows]
        self.new, self._writes = None, []


class Sdpa(TorchLayer):
    """`scaled_dot_product_attention` by the fastest of its backends, which its row names.

    Query heads that share a kv head are given as query tokens of one head.
    """

    def prepare(self):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        times = {}
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            self._form = functools.partial(sdpa_kernel, getattr(SDPBackend, name))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # on why a backend cannot do it
                    times[name] = min(synchronised(self, 4)), self._form
            except RuntimeError:  # a backend that cannot
                continue
        if not times:
            raise NotImplementedError("no backend of scaled_dot_product_attention takes this")
        fastest = min(times, key=lambda name: times[name][0])
        self.numbers["form"], self._form = fastest.partition("_")[0].lower(), times[fastest][1]

    def attend(self, call, values):
        from torch.nn.functional import scaled_dot_product_attention

        query, keys, *_ = call.arguments
        grouped = query.view(len(query), keys.shape[1], -1, query.shape[-1])
        with self._form():
            return (scaled_dot_product_attention(grouped, keys, values).reshape(query.shape),)
