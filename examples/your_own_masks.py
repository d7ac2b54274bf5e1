"""Keep the neurons of your choice: `python examples/your_own_masks.py`.

In this example, each text votes for the best half of a layer's neurons, and the layer keeps the half with most votes.
"""

from __future__ import annotations

import numpy as np

import griffin_jax as gj

TEXTS = [
    "Honeybees tell each other where flowers are by dancing on the comb.",
    "The river has three bridges, and the oldest of them was built in 1874.",
    "To bake bread without a scale, fill a bowl with flour to the height of two fingers.",
]


def main() -> None:
    """Select by three texts, keep the neurons with most votes, and answer with those."""
    llm = gj.load("smollm2-135m-instruct")
    votes = [np.asarray(mask).sum(axis=0) for mask in llm.experts(TEXTS, density=0.5).masks()]  # (F,) per layer

    masks = []
    for layer in votes:
        mask = np.zeros(layer.size, bool)
        mask[np.argsort(-layer, kind="stable")[: layer.size // 2]] = True
        masks.append(mask)
    experts = gj.ExpertNeurons.from_masks(masks)
    agreed = sum(int(((layer >= 2) & mask).sum()) for layer, mask in zip(votes, masks, strict=True))
    print(f"{agreed:,} of {sum(experts.kept):,} kept neurons are among the best half of at least two texts")

    out = llm.generate("The tallest mountain on Earth is", experts=experts, max_new_tokens=12)
    print(repr(out.texts[0]))


if __name__ == "__main__":
    main()
