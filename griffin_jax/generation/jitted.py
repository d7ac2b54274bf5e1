"""Compiled versions of the steps prefill, select and decode, and of those for scoring and conversations.

They are the functions of the same names under `griffin_jax.utils.programs.jit` (`jax.jit` with a bounded number of
programs), with the right arguments static and donated. `prune` is not among them: its gather is jitted already, and jit
would copy the arrays that it only passes through.
"""

from __future__ import annotations

import weakref

from jax import Array
from jax.core import Tracer

from griffin_jax.generation import conversation, scoring
from griffin_jax.generation import decode as decoding
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.generation.prefill import prefill as _prefill
from griffin_jax.generation.sampling import Greedy, Sampler
from griffin_jax.griffin.select import magnitude
from griffin_jax.griffin.select import select as _select
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.cache import KVCache
from griffin_jax.model.transformer import Transformer
from griffin_jax.utils import programs

prefill = programs.jit(_prefill, static_argnames=("max_new_tokens", "chunk", "collect", "rows", "last"))
select = programs.jit(_select, static_argnames=("config",))
decode = programs.jit(decoding.decode, static_argnames=("eos",), donate_argnames=("state",))
teacher_force = programs.jit(scoring.teacher_force, static_argnames=("collect",))
extend = programs.jit(scoring.extend, static_argnames=("last",))
losses = programs.jit(scoring.losses)
compare = programs.jit(scoring.compare)
teacher_forced = programs.jit(scoring.teacher_forced, static_argnames=("prompt_length", "config"))
start = programs.jit(conversation.start, static_argnames=("slots", "rows"))
read_more = programs.jit(conversation.read_more, static_argnames=("last",), donate_argnames=("read",))
cut = programs.jit(conversation.cut, donate_argnames=("cache",))
with_room = programs.jit(conversation.with_room, static_argnames=("slots",))


def init_decode(
    prefilled: Prefilled, *, sampler: Sampler = Greedy(), eos: tuple[int, ...] = (), seed: int | Array = 0
) -> decoding.DecodeState:
    """`griffin_jax.init_decode`, compiled. The cache is donated, so `prefilled` cannot be used again."""
    parts = prefilled.cache, prefilled.logits, prefilled.statistics.tokens
    return _init_decode(*parts, max_new_tokens=prefilled.max_new_tokens, sampler=sampler, eos=eos, seed=seed)


@programs.jit(static_argnames=("max_new_tokens", "eos"), donate_argnames=("cache",))
def _init_decode(
    cache: KVCache,
    logits: Array,
    tokens: Array,
    max_new_tokens: int,
    sampler: Sampler,
    eos: tuple[int, ...],
    seed: int | Array,
) -> decoding.DecodeState:
    nothing = logits[:, :0]
    prefilled = Prefilled(logits, nothing, cache, Statistics((), tokens), max_new_tokens)
    return decoding.init_decode(prefilled, sampler=sampler, eos=eos, seed=seed)


_magnitude = programs.jit(magnitude)
_known: weakref.WeakKeyDictionary[Transformer, tuple[list[weakref.ref[Array]], tuple[Array, ...]]]
_known = weakref.WeakKeyDictionary()
"""For each model, the matrices that its magnitudes were computed from, and the magnitudes."""


def magnitudes_of(model: Transformer) -> tuple[Array, ...] | None:
    """The `magnitudes` that `griffin_jax.select` takes, computed once per model; None if it has no routed experts."""
    if model.config.routing is None:
        return None
    matrices = [part.gate_up.get_value() for layer in model.layers for part in layer.ff.parts()]
    if any(isinstance(matrix, Tracer) for matrix in matrices):
        return magnitude(model)
    known = _known.get(model)
    if known is None or any(ref() is not matrix for ref, matrix in zip(known[0], matrices, strict=True)):
        known = _known[model] = [weakref.ref(matrix) for matrix in matrices], _magnitude(model)
    return known[1]
