"""Dividing a dense model's feed-forward layers into experts: `factorize`."""

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
"""What all experts have in common."""

OF_OUTPUTS = ("down_scale",)
"""What every expert has a copy of."""


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
    """The model with each feed-forward layer divided into experts, before any training (FactorLLM, arXiv 2408.11855).

    All experts together are the dense layer: with `active` equal to `experts` the result computes what the model does.
    The routers are random.

    Args:
        model: a dense model, in any format of weights, on a mesh or not.
        experts: N, groups of neurons of each layer.
        active: k, experts that each token chooses.
        grouping: how neurons are grouped, see `griffin_jax.factor.grouping`.
        activations: of general text, which `coactivation` needs.
        scale: what the sum of the chosen experts is multiplied by. FactorLLM has N / k; 1, which leaves each expert as
            it is, is much nearer to the dense model as long as there are few experts.
        seed: of the routers, of random groups and of k-means.

    Raises:
        ValueError: the model is not a dense one, the numbers of experts cannot be, or the grouping is not known or
            lacks activations.
        ImportError: the grouping needs scikit-learn, and it is not installed.
    """
    check_factors(model.config, experts, active)
    if model.neurons != model.config.neurons:
        raise ValueError("the model is pruned; factorize the full one")
    if model.adapted:
        raise ValueError("the model has an adapter; merge it, or factorize the model without it")
    groups = group_neurons(model, experts, grouping, activations=activations, seed=seed)
    return divide(model, groups, active, scale=scale, seed=seed)


def check_factors(config: ModelConfig, experts: int, active: int) -> None:
    """Raise `ValueError` unless a model's layers can be divided into so many experts.

    Args:
        config: of the dense model.
        experts: groups of neurons of each layer.
        active: experts that each token chooses.
    """
    if config.routing is not None:
        raise ValueError("the model has routed experts already; only dense layers are divided")
    check_divisible(config.ff_width, experts)
    if isinstance(active, bool) or not isinstance(active, int) or not 1 <= active <= experts:
        raise ValueError(f"active must be a whole number from 1 to the {experts} experts, got {active!r}")


def factored_config(config: ModelConfig, experts: int, active: int, scale: float = 1.0) -> ModelConfig:
    """The architecture of a factored model, from that of the dense one."""
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
    """The model with these groups of neurons of each layer as experts, and with random routers.

    Args:
        model: a dense model.
        groups: the neurons of each expert, of each layer.
        active: experts that each token chooses.
        means: of each layer, what each expert gives on average: it becomes the layer's, and is subtracted from what the
            expert gives. Zeros if there are none.
        scale: as for `factorize`.
        seed: of the routers.

    Raises:
        ValueError: the groups are not all neurons, each once.
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
    """Path and weights of every parameter of the factored model."""
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
