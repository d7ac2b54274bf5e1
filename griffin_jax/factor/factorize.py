"""Divides the feed-forward layers of a dense model into experts: `factorize`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from griffin_jax.factor.grouping import Grouping, Groups, check_divisible, group_neurons
from griffin_jax.model.assembly import assemble, disassemble
from griffin_jax.model.config import ModelConfig, Routing
from griffin_jax.model.sharding import check_mesh, model_shardings
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size, mesh_of

OF_THE_ACTIVATION = ("positive_curve", "negative_curve")
"""Parameters of a dense layer that all its experts share."""

OF_OUTPUTS = ("down_scale",)
"""Parameters of a dense layer of which every expert gets a copy."""


def factorize(
    model: Transformer,
    experts: int = 4,
    active: int = 2,
    *,
    grouping: Grouping = "contiguous",
    activations: Sequence[Float[np.ndarray, "t _f"]] = (),
    scale: float = 1.0,
    seed: int = 0,
) -> Transformer:
    """Divide each feed-forward layer of a dense model into experts, without training (FactorLLM, arXiv 2408.11855).

    All experts together are the dense layer: if `active` equals `experts`, the result computes what `model` computes.
    The routers are random.

    Args:
        model: a dense model with weights in any format, on a mesh or not.
        experts: N, the number of experts in each layer.
        active: k, the number of experts that each token chooses.
        grouping: how neurons are grouped; see `griffin_jax.factor.grouping`.
        activations: for each layer, the relative activations of some tokens of general text, (T, F), as
            `griffin_jax.factor.general.activations` returns them; only `coactivation` needs them.
        scale: factor of the sum of the chosen experts. FactorLLM uses N / k. The default 1, which does not change the
            experts' outputs, is much nearer to the dense model if there are few experts.
        seed: seed of the routers, of random groups and of k-means.

    Raises:
        ValueError: the model has routed experts already, is pruned or has an adapter; `experts` or `active` is not
            possible; or the grouping is unknown or lacks activations.
        ImportError: the grouping needs scikit-learn, which is not installed.
    """
    check_factors(model.config, experts, active)
    if model.neurons != model.config.neurons:
        raise ValueError("the model is pruned; factorize the full one")
    if model.adapted:
        raise ValueError("the model has an adapter; merge it, or factorize the model without it")
    groups = group_neurons(model, experts, grouping, activations=activations, seed=seed)
    return divide(model, groups, active, scale=scale, seed=seed)


def check_factors(config: ModelConfig, experts: int, active: int) -> None:
    """Raise `ValueError` unless the layers of a model can be divided into this number of experts.

    Args:
        config: configuration of the dense model.
        experts: number of experts in each layer.
        active: number of experts that each token chooses.
    """
    if config.routing is not None:
        raise ValueError("the model has routed experts already; only dense layers are divided")
    check_divisible(config.ff_width, experts)
    if isinstance(active, bool) or not isinstance(active, int) or not 1 <= active <= experts:
        raise ValueError(f"active must be a whole number from 1 to the {experts} experts, got {active!r}")


def factored_config(config: ModelConfig, experts: int, active: int, scale: float = 1.0) -> ModelConfig:
    """The configuration of a factored model, from that of the dense model."""
    routing = Routing(
        experts,
        active,
        config.ff_width // experts,
        scores="equal",
        scale=float(scale),
        router_bias=True,
        centred=True,
    )
    return dataclasses.replace(config, routing=routing)


def divide(
    model: Transformer,
    groups: Sequence[Groups],
    active: int,
    *,
    means: Sequence[Float[Array | np.ndarray, "e d"]] = (),
    scale: float = 1.0,
    seed: int = 0,
) -> Transformer:
    """Make a factored model whose experts are the given groups of neurons, with random routers.

    Args:
        model: a dense model.
        groups: for each layer, the neurons of each expert.
        active: number of experts that each token chooses.
        means: for each layer, the average output of each expert, (E, D): it is added to the layer's bias and subtracted
            from the expert's output. Empty for zeros.
        scale: as for `factorize`.
        seed: seed of the routers.

    Raises:
        ValueError: the groups of a layer do not contain each of its neurons exactly once.
    """
    for number, (group, neurons) in enumerate(zip(groups, model.neurons, strict=True)):
        if not np.array_equal(np.sort(group, axis=None), np.arange(neurons)):
            raise ValueError(f"the groups of layer {number} are not its {neurons} neurons, each once")
    count = len(groups[0])
    config = factored_config(model.config, count, active, scale)
    mesh = mesh_of(model.embedding[...])
    if mesh is not None:
        check_mesh(config, axis_size(mesh, MODEL_AXIS))
    factored = assemble(config, _arrays(model, groups, means, count, seed), model.dtype, model.weights)
    return factored if mesh is None else jax.device_put(factored, model_shardings(factored, mesh))


def _arrays(
    model: Transformer,
    groups: Sequence[Groups],
    means: Sequence[Float[Array | np.ndarray, "e d"]],
    count: int,
    seed: int,
) -> Iterator[tuple[str, Any]]:
    """The path and the weights of every parameter of the factored model."""
    d = model.config.width
    biases = [jnp.zeros((d,), model.dtype)] * len(model.layers)
    for path, array in disassemble(model):
        layer, inside, name = path.partition(".ff.")
        if not inside:
            yield path, array
        elif name == "down_bias":
            biases[int(layer.rpartition(".")[-1])] = array
        elif name in OF_THE_ACTIVATION:
            yield f"{layer}.ff.experts.{name}", array
        elif name in OF_OUTPUTS:
            yield f"{layer}.ff.experts.{name}", jnp.broadcast_to(array, (count, *array.shape))
        else:
            number = int(layer.rpartition(".")[-1])
            yield f"{layer}.ff.experts.{name}", jnp.take(array, jnp.asarray(groups[number]), axis=0, mode="clip")
    for number, key in enumerate(jax.random.split(jax.random.key(seed), len(model.layers))):
        router = jax.random.normal(key, (count, d), jnp.float32) * d**-0.5
        yield f"layers.{number}.ff.router", router.astype(model.dtype)
        yield f"layers.{number}.ff.router_bias", jnp.zeros((count,), model.dtype)
        mean = jnp.asarray(means[number]) if means else jnp.zeros((count, d))
        yield f"layers.{number}.ff.experts.down_bias", (-mean).astype(model.dtype)
        whole = biases[number].astype(jnp.float32) + jnp.sum(mean, axis=0)
        yield f"layers.{number}.ff.down_bias", whole.astype(model.dtype)
