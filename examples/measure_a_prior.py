"""Measure what a model's neurons do in general text, and also select by that: `python examples/measure_a_prior.py`.

`griffin-jax prior` does this for files of any size, and adds budgets for the layers. This example measures only the
statistic and the calibration rows, and only of a few sentences, which is too little text to gain much.
"""

from __future__ import annotations

import griffin_jax as gj
from griffin_jax.evaluation import general_text

GENERAL = (
    "A lighthouse keeper writes down the weather four times a day. The book is older than the lamp, and its first "
    "pages are in a hand nobody alive can read without effort. On the last line of every page somebody has counted "
    "the ships. To bake bread without a scale, take a bowl and fill it with flour to the height of two fingers. "
    "Add a pinch of salt, a spoon of yeast, and warm water until the dough lets go of the bowl. Cover it with a "
    "cloth for an hour. "
)
PROMPT = "The river has three bridges. The oldest, built in 1874,"


def main() -> None:
    """Measure a prior, save it, and answer with and without it."""
    llm = gj.load("smollm2-135m-instruct")
    windows = list(general_text.windows(llm.tokenizer, GENERAL, 64))
    prior = general_text.measure(llm.model, windows, size=2, rows=32, quiet=True)
    prior.save("few-sentences.prior.safetensors")
    print(f"{prior.tokens} tokens, {prior.rows[0].shape[0]} calibration rows of each layer")

    dense = llm.generate(PROMPT, density=1, max_new_tokens=16)
    plain = llm.generate(PROMPT, density=0.5, max_new_tokens=16)
    helped = llm.generate(PROMPT, density=0.5, prior=prior, refit=True, max_new_tokens=16)
    for name, out in (("dense", dense), ("GRIFFIN", plain), ("with prior and refit", helped)):
        print(f"{name:21} {out.texts[0]!r}")


if __name__ == "__main__":
    main()
