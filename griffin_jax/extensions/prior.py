"""Beyond GRIFFIN: a prior, which also ranks neurons by what they do in general text (after GLASS, arXiv 2508.14302).

    prior = Prior.load("smollm2.prior.safetensors")          measured once per model, by `griffin-jax prior`
    experts = select(prefilled.statistics, config, fuse=prior.fusion(0.5))

A prompt says little about neurons that only its answer will need. Neurons are therefore ranked twice, by their
statistic s in the prompt and by the same statistic p in general text, and those with the largest

    score = (1 - w) * rank(s) + w * rank(p)

are kept. Ranks are used because the statistics of different texts have different scales.

The same texts also show which layers can spare the most neurons, so that layers may keep different shares of theirs:

    config = prior.budgeted(GriffinConfig(density=0.5))      as many neurons in all, each layer with its own share

The loss from dropping neuron j of a layer is estimated as p_j^2 c_j / 2, where c_j is the neuron's sensitivity
(`griffin_jax.extensions.sensitivity`). The shares lie between equal ones and those with the least total loss. How far
they go was chosen on held-out texts: dropping many neurons loses more than the sum of their single losses, so going all
the way would be too far.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from griffin_jax.griffin.config import GriffinConfig, Method, density_that_keeps
from griffin_jax.griffin.select import check_fusible
from griffin_jax.utils.arrayfile import load_arrays, save_arrays
from griffin_jax.utils.options import number

PRIOR_FORMAT = "griffin_jax prior 2"

DEFAULT_WEIGHT = 0.5
"""Default weight w of the rank in general text; the rank in the prompt has weight 1 - w."""

_BUDGETED: weakref.WeakKeyDictionary[Prior, dict[GriffinConfig, GriffinConfig]] = weakref.WeakKeyDictionary()
"""For each prior, the configs that `Prior.budgeted` has given densities to, and the results."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
    """What a model's neurons do in general text.

    Attributes:
        squares: s^2 of every neuron over all texts together, (F,) for each layer, float32.
        rows: calibration rows for a `Reconstruction`, (C, F) for each layer, float16; empty if there are none. Their
            second moments are close to those of the relative activations of a token of the texts; see
            `griffin_jax.extensions.sketch`.
        model: fingerprint of the model that the prior belongs to.
        tokens: number of tokens of the texts.
        sensitivity: how much predictions depend on each neuron, (F,) for each layer; see
            `griffin_jax.extensions.sensitivity`. Empty if it was not measured.
        strength: how far the shares of the layers are on the way from equal ones (0) to those with the least loss (1).
        uniform: the reason why all layers keep the same share; empty if they keep different ones.
        ranges: for a model with routed experts, the sizes of the ranges that each layer's neurons are divided into
            (`ModelConfig.neuron_ranges`). All experts of a layer keep equally many neurons.
    """

    squares: tuple[Float[Array, "_f"], ...]
    rows: tuple[Float[Array, "_c _f"], ...]
    model: str = dataclasses.field(metadata={"static": True})
    tokens: int = dataclasses.field(metadata={"static": True})
    sensitivity: tuple[Float[Array, "_f"], ...] = ()
    strength: float = dataclasses.field(default=0.0, metadata={"static": True})
    uniform: str = dataclasses.field(default="the sensitivity of neurons was not measured", metadata={"static": True})
    ranges: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), metadata={"static": True})

    def check(self, model: str) -> None:
        """Raise `ValueError` unless this prior belongs to a model.

        Args:
            model: the model's `griffin_jax.model.fingerprint.fingerprint`.
        """
        if model != self.model:
            raise ValueError(
                f"this prior is of model {self.model}, the model is {model}: its weights or their dtype are others;"
                " measure it with griffin-jax prior --overwrite"
            )

    def budgeted(self, config: GriffinConfig) -> GriffinConfig:
        """Give each layer its own density, so that as many neurons are kept in all.

        Every layer, and each of its routed experts, keeps a multiple of both `config.round_to` and `config.groups`. If
        only some layers have routed experts, the others keep the config's density.

        Args:
            config: a config with one density for all layers.

        Returns:
            A config with a density for each layer, or the same config if all layers keep the same share (`uniform`).

        Raises:
            ValueError: the config has a density for each layer already.
        """
        if isinstance(config.density, Sequence):
            raise ValueError("budgets choose a density for each layer, and there is one for each already; give one")
        if not self.strength:
            return config
        # Every answer calls this, and sorting all neurons of a large model takes half a second.
        known = _BUDGETED.setdefault(self, {})
        if config not in known:
            known[config] = _budgeted(self, config)
        return known[config]

    def fusion(self, weight: float | Float[Array, ""] = DEFAULT_WEIGHT) -> Fusion:
        """The function that `select` takes as `fuse`.

        Args:
            weight: w, the weight of the rank in general text, in [0, 1]; 0 selects as without the prior.

        Raises:
            ValueError: the weight is outside its range.
        """
        check_weight(weight)
        return Fusion(self.squares, weight)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prior to a safetensors file, completely or not at all; an existing file is replaced.

        Raises:
            OSError: the file cannot be written.
        """
        arrays = {f"layers.{layer}.squares": np.asarray(squares) for layer, squares in enumerate(self.squares)}
        arrays |= {f"layers.{layer}.rows": np.asarray(rows) for layer, rows in enumerate(self.rows)}
        arrays |= {f"layers.{layer}.sensitivity": np.asarray(weight) for layer, weight in enumerate(self.sensitivity)}
        counts = {"tokens": str(self.tokens), "layers": str(len(self.squares))}
        metadata = {"model": self.model, "strength": repr(self.strength), "uniform": self.uniform, **counts}
        if self.ranges:
            metadata["ranges"] = json.dumps(self.ranges)
        save_arrays(path, PRIOR_FORMAT, arrays, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prior:
        """The prior from a file that `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, or has another format or version.
        """
        arrays, metadata = load_arrays(path, PRIOR_FORMAT)
        try:
            layers = int(metadata["layers"])
            squares = _layers(arrays, "squares", layers, np.float32, 1)
            rows = _layers(arrays, "rows", layers, np.float16, 2) if "layers.0.rows" in arrays else ()
            weights = _layers(arrays, "sensitivity", layers, np.float32, 1) if "layers.0.sensitivity" in arrays else ()
            for found in (rows, weights):
                if found and [layer.shape[-1] for layer in found] != [layer.shape[0] for layer in squares]:
                    raise ValueError("its arrays are of different widths")
            strength = float(metadata["strength"])
            if not 0 <= strength <= bool(weights):
                raise ValueError(f"strength {strength} of budgets with {len(weights)} layers of sensitivity")
            counts = metadata["model"], int(metadata["tokens"])
            ranges = tuple(map(tuple, json.loads(metadata.get("ranges", "[]"))))
            if ranges and [sum(sizes) for sizes in ranges] != [layer.shape[0] for layer in squares]:
                raise ValueError(f"ranges {ranges!r:.200} are those of other layers")
            return cls(squares, rows, *counts, weights, strength, metadata["uniform"], ranges)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def combined(priors: Sequence[Prior]) -> Prior:
    """The prior of all texts together, from several priors of one model.

    Statistics add up. Calibration rows and budgets do not, so the result has none.

    Args:
        priors: the priors, at least one.

    Raises:
        ValueError: there are no priors, or they belong to different models.
    """
    models = {prior.model for prior in priors}
    if len(models) != 1:
        raise ValueError(f"priors are combined that are of one model, these are of {len(models)}")
    layers = zip(*(prior.squares for prior in priors), strict=True)
    squares = tuple(jnp.sum(jnp.stack(layer), axis=0) for layer in layers)
    return Prior(squares, (), models.pop(), sum(prior.tokens for prior in priors))


def _layers(
    arrays: dict[str, np.ndarray], name: str, layers: int, dtype: type[np.floating], axes: int
) -> tuple[Array, ...]:
    found = [arrays[f"layers.{layer}.{name}"] for layer in range(layers)]
    for array in found:
        if array.dtype != dtype or array.ndim != axes or not np.isfinite(array).all():
            raise ValueError(f"an array is {array.dtype} of shape {array.shape}, or not finite")
    return tuple(map(jnp.asarray, found))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Fusion:
    """Fuses the scores of a prompt with those of general text by rank: (1 - w) * rank(s) + w * rank(p), float32.

    The rank of a value is the number of smaller values, so equal values have equal ranks. Among neurons with equal
    scores in the prompt, general text therefore decides; for example in routed experts that no token of the prompt
    chose.

    Attributes:
        squares: p^2 of every neuron, (F,) for each layer.
        weight: w; 0 ranks as the prompt does, 1 as general text does.
    """

    squares: tuple[Float[Array, "_f"], ...]
    weight: float | Float[Array, ""]

    def __call__(self, scores: tuple[Float[Array, "*b _f"], ...]) -> tuple[Float[Array, "*b _f"], ...]:
        """The fused scores of every layer.

        Args:
            scores: the scores in the prompt, (F,) or (B, F) for each layer.

        Raises:
            ValueError: the scores and the prior have different numbers of layers or neurons.
        """
        widths = [[layer.shape[-1] for layer in layers] for layers in (scores, self.squares)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"this prior is of {len(widths[1])} layers with {sorted(set(widths[1]))} neurons, the statistics are"
                f" of {len(widths[0])} with {sorted(set(widths[0]))}"
            )
        return tuple(
            (1 - self.weight) * _rank(score) + self.weight * _rank(square)
            for score, square in zip(scores, self.squares, strict=True)
        )


def check_fusion(method: Method, weight: object) -> None:
    """Raise `ValueError` unless scores of this method can be fused with a prior of this weight."""
    check_fusible(method)
    check_weight(weight)


def check_weight(weight: object) -> Any:
    """Returns the weight of a prior as a Python number. A traced weight, inside jit, was checked before.

    Raises:
        ValueError: the weight is outside [0, 1].
    """
    return number("prior_weight", weight, "in [0, 1]", lambda weight: 0 <= weight <= 1)


def _rank(score: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    order = jnp.argsort(score, axis=-1)
    rising = jnp.take_along_axis(score, order, axis=-1)
    place = jnp.broadcast_to(jnp.arange(score.shape[-1], dtype=jnp.int32), score.shape)
    # Equal values get the place of the first of them.
    larger = jnp.diff(rising, axis=-1, prepend=rising[..., :1]) > 0
    ranks = jax.lax.cummax(jnp.where(larger, place, 0), axis=score.ndim - 1)
    return jnp.take_along_axis(ranks, jnp.argsort(order, axis=-1), axis=-1).astype(jnp.float32)


def _budgeted(prior: Prior, config: GriffinConfig) -> GriffinConfig:
    ranges = prior.ranges or tuple((squares.shape[0],) for squares in prior.squares)
    alike = [layer for layer, sizes in enumerate(ranges) if len(sizes) == max(map(len, ranges))]
    losses = [
        _by_rank(
            np.asarray(prior.squares[layer], np.float64) * np.asarray(prior.sensitivity[layer], np.float64),
            ranges[layer],
        )
        for layer in alike
    ]
    round_to = math.lcm(config.round_to, config.group_count)
    uniform = config.kept([len(loss) for loss in losses])
    kept = between(uniform, share_out(losses, uniform, round_to=round_to), prior.strength, round_to=round_to)
    density = [config.density] * len(ranges)
    for layer, k, loss in zip(alike, kept, losses, strict=True):
        density[layer] = density_that_keeps(k, len(loss))
    # In ranges of other sizes, these shares are no multiples by themselves.
    return dataclasses.replace(config, density=tuple(density), round_to=round_to)


def _by_rank(losses: Float[np.ndarray, "f"], sizes: Sequence[int]) -> Float[np.ndarray, "f_e"]:
    """The total loss from dropping the neurons of each rank, best first, if all ranges drop equal shares.

    Args:
        losses: the loss from dropping each neuron of the layer, (F,).
        sizes: sizes of the ranges. The ranks are those of the first range; in a range of another size, ranks are scaled
            to it.

    Returns:
        The sum of the losses of all neurons of each rank, with one entry for each neuron of the first range.
    """
    found, start = np.zeros(sizes[0]), 0
    for size in sizes:
        best_first = -np.sort(-losses[start : start + size])
        # The number of neurons that the first range keeps, less one, if this range keeps 1, 2, ... neurons.
        rank = -(-np.arange(1, size + 1) * sizes[0] // size) - 1
        found += np.bincount(rank, best_first, sizes[0])
        start += size
    return found


def share_out(losses: Sequence[Float[np.ndarray, "_f"]], kept: Sequence[int], *, round_to: int = 1) -> tuple[int, ...]:
    """Divides the kept neurons among the layers so that the total loss from the dropped ones is smallest.

    The sum stays that of `kept`. A layer keeps its best neurons first, so further neurons are worth less and less.
    Repeatedly taking the best next block of neurons of any layer is therefore optimal.

    Args:
        losses: for each layer, the loss from dropping each neuron, at least 0.
        kept: number of neurons that each layer would keep with equal shares.
        round_to: size of a block. Every layer keeps a multiple of it, and at least one block.

    Returns:
        The number of neurons that each layer keeps; `kept` itself if a layer would keep all its neurons or not a
        multiple of `round_to`.
    """
    if any(k % round_to or k == len(loss) for k, loss in zip(kept, losses, strict=True)):
        return tuple(kept)
    blocks = []
    for layer, loss in enumerate(losses):
        ordered = -np.sort(-np.asarray(loss, np.float64))
        worth = np.add.reduceat(ordered, np.arange(round_to, len(ordered), round_to))
        # The last block may be smaller.
        blocks += [(-value, number, layer) for number, value in enumerate(worth[: len(ordered) // round_to - 1])]
    taken = sorted(blocks)[: sum(kept) // round_to - len(losses)]
    found = round_to * (1 + np.bincount([layer for *_, layer in taken], minlength=len(losses)))
    return tuple(map(int, found))


def between(uniform: Sequence[int], best: Sequence[int], strength: float, *, round_to: int = 1) -> tuple[int, ...]:
    """Numbers of kept neurons part of the way from uniform to best, with the same sum.

    Args:
        uniform: number of neurons that each layer keeps with equal shares, multiples of `round_to`.
        best: number of neurons that each layer keeps with the least loss, multiples of `round_to`, with the same sum.
        strength: how far to go, from 0 (`uniform`) to 1 (`best`).
        round_to: every layer keeps a multiple of this number.
    """
    exact = (np.asarray(uniform) + strength * (np.asarray(best) - np.asarray(uniform))) / round_to
    blocks = np.floor(exact).astype(int)
    # The blocks that are left over after rounding down go to the layers with the largest remainders.
    left = sum(uniform) // round_to - blocks.sum()
    blocks[np.argsort(blocks - exact, kind="stable")[:left]] += 1
    return tuple(map(int, blocks * round_to))


def prior_path(model: str) -> Path:
    """The default path of the file with a model's prior.

    It is next to the model's folder or file, or in the working directory if there is no folder or file of that name.

    Args:
        model: path or name of the model.
    """
    path = Path(model).absolute() if Path(model).exists() else Path.cwd() / Path(model).name
    return path.with_name(f"{path.name}.prior.safetensors")


def load_for_best(model: str, file: str | Path | None) -> Prior:
    """Loads the prior that quality "best" needs.

    Args:
        model: path or name of the model.
        file: the prior's file; the one at `prior_path` if None.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or has another format or version.
    """
    path = Path(file) if file else prior_path(model)
    if not path.is_file():
        raise FileNotFoundError(
            f"--quality best needs a prior, and there is no file {path}; measure it with griffin-jax prior"
        )
    return Prior.load(path)
