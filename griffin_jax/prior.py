"""Beyond GRIFFIN: what neurons do in any text, beside what they do in the prompt (after GLASS, arXiv 2508.14302).

    prior = Prior.load("smollm2.prior.safetensors")          that `griffin-jax prior` measured, once for a model
    experts = select(prefilled.statistics, config, prior=prior)

A prompt says little about neurons that it does not need and its answer will. So they are ranked twice, by the prompt's
statistic s and by the same statistic p of general text, and kept by

    score = (1 - w) * rank(s) + w * rank(p)

Ranks, because the statistics of different texts have different scales.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from griffin_jax.arrayfile import load_arrays, save_arrays
from griffin_jax.config import Method

PRIOR_FORMAT = "griffin_jax prior 1"

DEFAULT_WEIGHT = 0.5
"""Of the prior's rank; the prompt's has the rest."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
    """What a model's neurons do in general text.

    Attributes:
        squares: per layer, s^2 of all texts together, float32.
        rows: per layer, relative activations of some tokens of the texts, float16: the calibration rows of a
            `Reconstruction`. No layers if there are none.
        model: fingerprint of the model that it belongs to.
        tokens: how many there were.
    """

    squares: tuple[Float[Array, "_f"], ...]
    rows: tuple[Float[Array, "_c _f"], ...]
    model: str = dataclasses.field(metadata={"static": True})
    tokens: int = dataclasses.field(metadata={"static": True})

    def check(self, model: str) -> None:
        """Raise `ValueError` unless this is the prior of a model.

        Args:
            model: its `griffin_jax.fingerprint.fingerprint`.
        """
        if model != self.model:
            raise ValueError(
                f"this prior is of model {self.model}, the model is {model}: its weights or their dtype are others;"
                " measure it with griffin-jax prior"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all; an existing one is replaced.

        Raises:
            OSError: it cannot be written.
        """
        arrays = {f"layers.{layer}.squares": np.asarray(squares) for layer, squares in enumerate(self.squares)}
        arrays |= {f"layers.{layer}.rows": np.asarray(rows) for layer, rows in enumerate(self.rows)}
        metadata = {"model": self.model, "tokens": str(self.tokens), "layers": str(len(self.squares))}
        save_arrays(path, PRIOR_FORMAT, arrays, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prior:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or of another kind or version.
        """
        arrays, metadata = load_arrays(path, PRIOR_FORMAT)
        try:
            layers = range(int(metadata["layers"]))
            squares = tuple(_checked(arrays[f"layers.{layer}.squares"], np.float32, 1) for layer in layers)
            has_rows = len(arrays) > len(squares)
            rows = tuple(_checked(arrays[f"layers.{layer}.rows"], np.float16, 2) for layer in layers if has_rows)
            if any(row.shape[1:] != square.shape for row, square in zip(rows, squares, strict=False)):
                raise ValueError("rows and statistics are of different widths")
            return cls(squares, rows, metadata["model"], int(metadata["tokens"]))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _checked(array: np.ndarray, dtype: type[np.floating], axes: int) -> Array:
    if array.dtype != dtype or array.ndim != axes or not np.isfinite(array).all():
        raise ValueError(f"an array is {array.dtype} of shape {array.shape}, or not finite")
    return jnp.asarray(array)


def check_fusion(method: Method, weight: object) -> None:
    """Raise `ValueError` unless statistics can be fused with a prior for this method with this weight."""
    if method != "topk":
        raise ValueError(f'a prior is for method "topk", which keeps the best neurons; method is {method!r}')
    # Inside of jit it is traced and has been checked.
    if not isinstance(weight, jax.Array) and not (isinstance(weight, int | float) and 0 <= weight <= 1):
        raise ValueError(f"prior_weight must be in [0, 1], got {weight!r}")


def fuse(
    scores: Sequence[Float[Array, "*b _f"]], prior: Prior, weight: float | Float[Array, ""]
) -> tuple[Float[Array, "*b _f"], ...]:
    """(1 - w) * rank(s) + w * rank(p) of every layer, float32.

    The smallest value has rank 0. Of equal ones the first has the highest rank, as `select` takes it first.

    Args:
        scores: per layer s, of each sequence or of the batch.
        prior: of the same layers.
        weight: w; 0 ranks as the prompt does, 1 as the prior.

    Raises:
        ValueError: the layers are others.
    """
    widths = [[layer.shape[-1] for layer in layers] for layers in (scores, prior.squares)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"this prior is of {len(widths[1])} layers with {sorted(set(widths[1]))} neurons, the statistics are of"
            f" {len(widths[0])} with {sorted(set(widths[0]))}"
        )
    return tuple(
        (1 - weight) * _rank(score) + weight * _rank(square)
        for score, square in zip(scores, prior.squares, strict=True)
    )


def _rank(score: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    order = jnp.argsort(score, axis=-1, stable=True, descending=True)
    return (score.shape[-1] - 1 - jnp.argsort(order, axis=-1)).astype(jnp.float32)
