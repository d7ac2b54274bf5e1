"""The four steps of GRIFFIN as one compiled function: `python examples/four_steps_under_jit.py`."""

from __future__ import annotations

import functools

import jax

import griffin_jax as gj


@functools.partial(jax.jit, static_argnames=("config", "new"))
def answer(
    model: gj.Transformer, tokens: jax.Array, lengths: jax.Array, config: gj.GriffinConfig, new: int
) -> jax.Array:
    """Answers of `new` tokens each, (B, new), with the neurons that each row's own prompt selects."""
    prefilled = gj.prefill(model, tokens, lengths, max_new_tokens=new)
    experts = gj.select(prefilled.statistics, config)
    pruned = gj.prune(model, experts)
    return gj.decode(pruned, gj.init_decode(prefilled), new).tokens


def main() -> None:
    """Answer two prompts of different lengths, dense and pruned."""
    llm = gj.load("smollm2-135m-instruct")
    prompts = ["The tallest mountain on Earth is", "Bees tell each other by dancing where flowers are. A dance shows"]
    tokens, lengths = gj.pad([llm.tokenizer.encode(prompt) for prompt in prompts], length=16)
    for density in (1.0, 0.75):
        for prompt, row in zip(prompts, answer(llm.model, tokens, lengths, gj.GriffinConfig(density), 16), strict=True):
            print(f"{density:4}  {prompt} ...{llm.tokenizer.decode(row.tolist())!r}")


if __name__ == "__main__":
    main()
