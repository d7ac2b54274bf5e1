"""Beyond GRIFFIN: how much a model's predictions depend on each neuron, by the Fisher information.

Let zbar_tj be the relative activation of neuron j at token t (`griffin_jax.griffin.statistic`), and l the loss of
tokens that are drawn from the model's own predictions. To second order, dropping the neuron changes the predictions by

    KL ~ zbar_tj^2 c_j / 2        c_j = mean_t (dl / dzbar_tj)^2

where c_j is the diagonal of the Fisher information with respect to the relative activations. A backward pass over each
of a few texts measures it in all layers at once.

The first half of a text stands for a prompt, which the full model reads whatever is pruned. Only the neurons'
activations at the tokens of the other half, and the predictions of that half, count. The sensitivity of an early layer,
which later tokens attend to, is therefore not inflated by more tokens than an answer has.

For routed experts, zbar is the relative activation within an expert, and the mean is over the tokens that chose the
expert. The statistic of a prompt is a sum over the same tokens, so the product of both still estimates the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

from griffin_jax.generation.padding import bucket, pad
from griffin_jax.model.cache import EMPTY, empty_cache
from griffin_jax.model.ops import float32_product
from griffin_jax.model.routed import Activations, RoutedActivations
from griffin_jax.model.transformer import Transformer
from griffin_jax.utils import programs

Seen = tuple[tuple[tuple[Array, Array], ...], ...]
"""What the observer `_square_norms` returned for each layer."""

HORIZON = 128
"""Largest number of tokens of a text that stand for an answer."""


def sensitivity(
    model: Transformer, texts: Sequence[Sequence[int]], *, seed: int = 0, quiet: bool = False
) -> tuple[Float[Array, "_f"], ...]:
    """c of every neuron: the mean squared derivative of the loss with respect to its relative activation.

    It needs the memory of a backward pass over one text.

    Args:
        model: the full model.
        texts: token ids of each text; the first 2 x `HORIZON` tokens are used.
        seed: seed for drawing tokens from the model's predictions.
        quiet: whether to hide the progress bar.

    Returns:
        c of the neurons of each layer, (F,), float32, in nats.

    Raises:
        ValueError: no text has at least two tokens.
    """
    long = [text[: 2 * HORIZON] for text in texts if len(text) > 1]
    if not long:
        raise ValueError("sensitivity needs texts of at least two tokens")
    sums, counts = ([np.zeros(neurons, np.float64) for neurons in model.neurons] for _ in range(2))
    for number, text in enumerate(tqdm(long, unit="text", desc="differentiating", disable=quiet or None)):
        tokens, lengths = pad([text], bucket(len(text)))
        squares, read = squared_gradients(model, tokens, lengths, jax.random.key(np.uint32(seed + number)))
        for totals, layers in ((sums, squares), (counts, read)):
            for total, layer in zip(totals, layers, strict=True):
                total += np.asarray(layer, np.float64)
    # For an expert that no token chose, both are 0.
    return tuple(
        jnp.asarray(total / np.maximum(count, 1), jnp.float32) for total, count in zip(sums, counts, strict=True)
    )


@programs.jit
def squared_gradients(
    model: Transformer, tokens: Int[Array, "b t"], lengths: Int[Array, "b"], key: Key[Array, ""]
) -> tuple[tuple[Float[Array, "_f"], ...], tuple[Float[Array, "_f"], ...]]:
    """sum_t (dl / dzbar_tj)^2 of every neuron over the second half of each text, and the number of tokens in the sum.

    Args:
        model: the full model.
        tokens: token ids of the texts, (B, T), padded on the right with any token.
        lengths: number of real tokens of each text, (B,).
        key: random key for drawing tokens from the model's predictions.

    Returns:
        The sums and the numbers of tokens, both (F,) for each layer, float32.
    """
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = jnp.where(columns < lengths[:, None], columns, EMPTY)
    counted = (columns >= lengths[:, None] // 2) & (columns < lengths[:, None])

    def read(offsets: tuple[Array, ...]) -> tuple[Array, Seen]:
        """The logits with offsets added to the outputs of the down projections, and the squared norms of z."""
        changed: Transformer = jax.tree.map(lambda leaf: leaf, model)
        for layer, offset in zip(changed.layers, offsets, strict=True):
            bias = layer.ff.down_bias
            # A bias is usually the same for every token; here every token has a separate one.
            layer.ff.down_bias = nnx.data(nnx.Param(offset if bias is None else offset + bias[...]))
        cache = empty_cache(model.config, tokens.shape[0], tokens.shape[1], model.dtype)
        hidden, _, seen = changed(tokens, positions, cache, read_slots=0, observe=_square_norms)
        return model.logits(hidden), seen

    def loss(offsets: tuple[Array, ...]) -> tuple[Array, Seen]:
        logits, seen = read(offsets)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        predicted = jax.nn.log_softmax(logits)
        losses = -jnp.take_along_axis(predicted, drawn[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(counted, losses, 0.0)), seen

    nothing = tuple(jnp.zeros((*tokens.shape, model.config.width), model.dtype) for _ in model.layers)
    gradients, seen = jax.grad(loss, has_aux=True)(nothing)
    squares, counts = [], []
    for layer, gradient, parts in zip(model.layers, gradients, seen, strict=True):
        # dl/dz = W_down dl/dy, and zbar = z / ||z||.
        by_neuron = jnp.einsum("btd,fd->btf", gradient, layer.ff.down_matrix(), preferred_element_type=jnp.float32)
        start, sums, tokens_of = 0, [], []
        for module, (norm, chose) in zip(layer.ff.parts(), parts, strict=True):
            own = by_neuron[..., start : start + module.neurons].reshape(*norm.shape, -1)
            weight = jnp.where(counted[..., None], norm, 0.0)
            sums.append(float32_product("bte,btef->ef", weight, jnp.square(own)).reshape(-1))
            count = jnp.sum(counted[..., None] & chose, axis=(0, 1), dtype=jnp.float32)
            tokens_of.append(jnp.repeat(count, own.shape[-1]))
            start += module.neurons
        squares.append(jnp.concatenate(sums))
        counts.append(jnp.concatenate(tokens_of))
    return tuple(squares), tuple(counts)


def _square_norms(_layer: int, z: Activations, _real: Array) -> tuple[tuple[Array, Array], ...]:
    """The observer that returns ||z||^2 within each expert, and which tokens chose it, both (B, T, E).

    It returns a pair for each module of a layer. A layer without routed experts, and the shared experts, count as one
    expert that every token chose.
    """

    def of_all(z: Array) -> tuple[Array, Array]:
        norm = jnp.sum(jnp.square(z.astype(jnp.float32)), axis=-1, keepdims=True)
        return norm, jnp.ones_like(norm, bool)

    if not isinstance(z, RoutedActivations):
        return (of_all(z),)
    choices = z.experts[..., None] == jnp.arange(z.count)
    norms = jnp.sum(jnp.square(z.z.astype(jnp.float32)), axis=tuple(range(3, z.z.ndim)))
    # A token chooses each expert once at most.
    experts = jnp.sum(jnp.where(choices, norms[..., None], 0.0), axis=2), jnp.any(choices, axis=2)
    return (experts,) if z.shared is None else (experts, of_all(z.shared))
