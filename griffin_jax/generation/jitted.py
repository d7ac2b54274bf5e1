"""The steps of `griffin_jax.generation.decode` and `griffin_jax.griffin.select`, compiled.

The same functions under `jax.jit`, with the arguments static and donated that should be. `prune` is
not among them: its gather is jitted inside, and jit would copy the arrays that it passes through.
"""

from __future__ import annotations

import functools

import jax
from jax import Array

from griffin_jax.extensions import speculative
from griffin_jax.generation import decode as generate
from griffin_jax.generation import scoring
from griffin_jax.generation.sampling import Greedy, Sampler
from griffin_jax.griffin import select as griffin
from griffin_jax.model.cache import KVCache

prefill = jax.jit(generate.prefill, static_argnames=("room", "chunk", "collect", "rows"))
select = jax.jit(griffin.select, static_argnames=("config",))
decode = jax.jit(generate.decode, static_argnames=("eos",), donate_argnames=("answer",))
decode_lossless = jax.jit(speculative.decode_lossless, static_argnames=("drafts", "eos"), donate_argnames=("answer",))
refresh = jax.jit(generate.refresh, static_argnames=("width", "eos"), donate_argnames=("answer", "statistics", "rows"))
follow = jax.jit(scoring.follow, static_argnames=("collect",))
follow_refreshed = jax.jit(scoring.follow_refreshed, static_argnames=("config", "width"))
extend = jax.jit(scoring.extend)
losses = jax.jit(scoring.losses)
compare = jax.jit(scoring.compare)
teacher_forced = jax.jit(generate.teacher_forced, static_argnames=("prompt_length", "config"))


def begin(
    prefilled: generate.Prefilled, *, sampler: Sampler = Greedy(), eos: tuple[int, ...] = (), seed: int | Array = 0
) -> generate.Answer:
    """`griffin_jax.begin`, compiled; the cache is donated, so `prefilled` cannot be used again."""
    parts = prefilled.cache, prefilled.logits, prefilled.statistics.tokens
    return _begin(*parts, room=prefilled.room, sampler=sampler, eos=eos, seed=seed)


@functools.partial(jax.jit, static_argnames=("room", "eos"), donate_argnames=("cache",))
def _begin(
    cache: KVCache, logits: Array, tokens: Array, room: int, sampler: Sampler, eos: tuple[int, ...], seed: int | Array
) -> generate.Answer:
    nothing = logits[:, :0]
    prefilled = generate.Prefilled(logits, nothing, cache, griffin.Statistics((), tokens), room)
    return generate.begin(prefilled, sampler=sampler, eos=eos, seed=seed)
