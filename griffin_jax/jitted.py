"""The steps of `griffin_jax.generate` and `griffin_jax.griffin`, compiled.

The same functions under `jax.jit`, with the arguments static and donated that should be. `prune` is
not among them: its gather is jitted inside, and jit would copy the arrays that it passes through.
"""

from __future__ import annotations

import jax

from griffin_jax import generate, griffin

prefill = jax.jit(generate.prefill, static_argnames=("room", "chunk", "collect"))
select = jax.jit(griffin.select, static_argnames=("config",))
begin = jax.jit(generate.begin, static_argnames=("room", "eos"), donate_argnames=("cache",))
decode = jax.jit(generate.decode, static_argnames=("eos",), donate_argnames=("answer",))
teacher_forced = jax.jit(generate.teacher_forced, static_argnames=("prompt_length", "config"))
