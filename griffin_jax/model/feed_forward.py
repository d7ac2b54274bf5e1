"""The feed-forward layer, whose neurons are what GRIFFIN keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from griffin_jax.model.config import Activation, ModelConfig
from griffin_jax.model.low_rank import plus_linear, plus_matmul, plus_matrix
from griffin_jax.model.parameters import array_of, bias_vector, matrix
from griffin_jax.model.products import linear, linear_of_each, matmul, matmul_of_each
from griffin_jax.model.weights import Outputs, WeightFormat, floating_rows

QUICK = 1.702
"""The slope of the sigmoid in `gelu_quick`."""

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "gelu_quick": lambda x: x * jax.nn.sigmoid(QUICK * x),
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}
"""All activations but `xielu`, which takes more than x."""

NEURON_AXES = {
    "gate_up": 1, "gate_up_scale": 1, "down": 0, "down_row_scale": 0, "gate_up_bias": 1,
    "gate_up_left": 1, "down_left": 0,
}  # fmt: skip
"""The parameters of a feed-forward layer that have a row for each neuron, with the axis that counts neurons."""

XIELU_SLOPE = 0.5
"""The slope of xIELU at 0, beta in its paper, which is not trained."""


def xielu(x: Float[Array, "..."], positive: Float[Array, "1"], negative: Float[Array, "1"]) -> Float[Array, "..."]:
    """Expanded integral of the exponential linear unit (arXiv 2411.13010, equation 12).

    Args:
        x: input.
        positive: curvature above 0, before its softplus.
        negative: curvature below 0, before its softplus.
    """
    above, below = jax.nn.softplus(positive), XIELU_SLOPE + jax.nn.softplus(negative)
    # The other branch must not overflow: its gradient would be NaN, and so would 0 * inf be.
    curved = jnp.where(x > 0, above * x * x, (jnp.expm1(jnp.minimum(x, 0)) - x) * below)
    return curved + XIELU_SLOPE * x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """left^T right, which is added to a down projection without being made.

    Attributes:
        left: rows over the neurons, for all sequences or for each its own.
        right: rows over the width, as many of them, likewise.
    """

    left: Float[Array, "... s f"]
    right: Float[Array, "... s d"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """Which neurons of a full feed-forward layer take part; see `griffin_jax.griffin.masked`.

    Attributes:
        kept: for the whole batch or for each sequence its own.
        changes: what is added to the rows of the down projection that are kept.
    """

    kept: Bool[Array, "... f"]
    changes: tuple[LowRank, ...] = ()

    def apply(self, z: Float[Array, "b t f"]) -> Float[Array, "b t f"]:
        """z, zero where a neuron is not kept."""
        return jnp.where(self.kept if self.kept.ndim == 1 else self.kept[:, None], z, 0)

    def changed(self, z: Float[Array, "b t f"], y: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What the changed rows project z to, from what the layer's own rows project it to."""
        if not self.changes:
            return y
        total = y.astype(jnp.float32)
        for change in self.changes:
            at_rows = _product("btf,sf->bts", "btf,bsf->bts", z, change.left)
            total = total + _product("bts,sd->btd", "bts,bsd->btd", at_rows, change.right)
        return total.astype(y.dtype)


def _product(shared: str, own: str, x: Array, y: Array) -> Array:
    """One of two products, by whether y is for all sequences or for each its own; float32."""
    equation = shared if y.ndim == 2 else own
    # XLA's CPU code has no product of batches of bfloat16 in this form.
    return jnp.einsum(equation, x.astype(jnp.float32), y.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


class NeuronModule(nnx.Module):
    """What has neurons: rows of its parameters, and the non-linearity that makes z from the products of x.

    Attributes:
        neuron_axes: the parameters that have a row for each neuron, with the axis that counts neurons.
        down_outputs: which axes of the down projection count outputs, see `griffin_jax.model.weights.quantise`.
        weights: how its matrices are stored.
        rest: a second group of rows, see `griffin_jax.extensions.in_place` and `griffin_jax.extensions.mixed`.
    """

    neuron_axes: ClassVar[Mapping[str, int]] = NEURON_AXES
    down_outputs: ClassVar[Outputs] = "last"
    gate_up: nnx.Param
    gate_up_scale: nnx.Param | None
    gate_up_bias: nnx.Param | None
    down: nnx.Param
    down_scale: nnx.Param | None
    down_row_scale: nnx.Param | None
    down_bias: nnx.Param | None

    def __init__(self, config: ModelConfig, dtype: DTypeLike, weights: WeightFormat):
        self.weights = weights
        self.activation: Activation = config.activation
        has_curves = config.activation == "xielu"
        self.positive_curve = bias_vector((1,), dtype) if has_curves else None
        self.negative_curve = bias_vector((1,), dtype) if has_curves else None
        self.clip, self.up_plus_one = config.ff_clip, config.up_plus_one
        self.gate_up_left: nnx.Param | None = nnx.data(None)
        self.gate_up_right: nnx.Param | None = nnx.data(None)
        self.down_left: nnx.Param | None = nnx.data(None)
        self.down_right: nnx.Param | None = nnx.data(None)
        self.rest: Self | None = nnx.data(None)

    def activated(self, y: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
        """z of what the matrices give, which lie along an axis: gate and up, or one if the layer is not gated."""
        gate = jnp.take(y, 0, axis=axis)
        z = self._curved(gate if self.clip is None else jnp.minimum(gate, self.clip))
        if y.shape[axis] == 1:
            return z
        up = jnp.take(y, 1, axis=axis)
        up = up if self.clip is None else jnp.clip(up, -self.clip, self.clip)
        return z * (up + 1 if self.up_plus_one else up)

    @property
    def neurons(self) -> int:
        """Number of neurons, those of all experts together."""
        return math.prod(self.down.shape[:-1]) + (0 if self.rest is None else self.rest.neurons)

    def rows(self) -> dict[str, nnx.Param]:
        """The parameters with a row for each neuron that there are."""
        named = {name: getattr(self, name) for name in self.neuron_axes}
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    def _curved(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        """The activation of y, in its dtype: computed in float32 at least and rounded once, as PyTorch does."""
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        if self.positive_curve is None or self.negative_curve is None:
            z = ACTIVATIONS[self.activation](wide)
        else:
            curves = self.positive_curve[...], self.negative_curve[...]
            z = xielu(wide, *(curve.astype(wide.dtype) for curve in curves))
        return z.astype(y.dtype)


class FeedForward(NeuronModule):
    """y = Wd^T z + b with z = act(Wg x) * (Wu x), or z = act(Wu x + b) if not gated.

    All matrices are neuron-major: each row belongs to a neuron, so that keeping a neuron is keeping a row of each. The
    matrices that multiply x are one, because one product reads weights faster than two do: `gate_up`, (2, F, D) with
    gate and up, or (1, F, D) if not gated. `down` is (F, D). After pruning there are K rows instead of F; where each
    sequence of a batch keeps neurons of its own, `gate_up` is (A, B, K, D), with A = 2 or 1, and `down` (B, K, D).

    Matrices of integers have scales (see `griffin_jax.model.weights`): `gate_up_scale` for each row, or for groups of
    it, (A, F, n); and for `down` either `down_scale` for each output, (D,), or `down_row_scale` for groups of each
    neuron's row, (F, n).

    The neurons may lie in two groups of rows, the second of which is `rest`; see `griffin_jax.extensions.in_place` and
    `griffin_jax.extensions.mixed`. Or all rows of a group stay, and its `mask` says which of its neurons take part; see
    `griffin_jax.griffin.masked`.

    The matrices may have additions of low rank, `gate_up_left` and `gate_up_right`, `down_left` and `down_right`; see
    `griffin_jax.model.low_rank`.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike,
        weights: WeightFormat,
        rngs: nnx.Rngs | None,
        neurons: int | None = None,
    ):
        super().__init__(config, dtype, weights)
        a, f, d = 2 if config.gated else 1, config.ff_width if neurons is None else neurons, config.width
        gate_up = matrix(rngs, (a, f, d), fan_in=d, weights=weights)
        self.gate_up, self.gate_up_scale = gate_up.values, gate_up.scale
        down = matrix(rngs, (f, d), fan_in=f, weights=weights, outputs=self.down_outputs)
        self.down, self.down_scale, self.down_row_scale = down.values, down.scale, down.row_scale
        self.gate_up_bias = bias_vector((a, f), dtype) if config.ff_bias else None
        self.down_bias = bias_vector((d,), dtype) if config.ff_bias else None
        self.mask: Mask | None = nnx.data(None)

    @property
    def neurons(self) -> int:
        """F, or K after pruning; a mask leaves it as it is."""
        return self.down.shape[-2] + (0 if self.rest is None else self.rest.neurons)

    @property
    def per_sequence(self) -> bool:
        """Whether each sequence of a batch has neurons of its own."""
        return self.down.ndim == 3

    def parts(self) -> tuple[NeuronModule, ...]:
        """The modules that the layer's neurons are in, in the order in which they count."""
        return (self,)

    def down_matrix(self) -> Float[Array, "... f d"]:
        """The down projection as floating numbers: itself, or what its integers stand for in float32, with what is
        added to it."""
        own = floating_rows(self.down[...], array_of(self.down_scale), array_of(self.down_row_scale))
        return plus_matrix(own, self.down_left, self.down_right)

    def gate_up_matrix(self) -> Float[Array, "a ... f d"]:
        """The matrices that multiply x as floating numbers, likewise."""
        own = floating_rows(self.gate_up[...], None, array_of(self.gate_up_scale))
        return plus_matrix(own, self.gate_up_left, self.gate_up_right)

    def intermediate(self, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
        """z, the input of the down projection: one value for each neuron and token, those of `rest` last, and zero
        where a mask leaves a neuron out."""
        z = self._own_intermediate(x)
        z = z if self.mask is None else self.mask.apply(z)
        return z if self.rest is None else jnp.concatenate([z, self.rest.intermediate(x)], axis=-1)

    def _own_intermediate(self, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
        product = linear_of_each if self.per_sequence else linear
        y = product(x, self.gate_up[...], array_of(self.gate_up_scale))
        y = plus_linear(y, x, self.gate_up_left, self.gate_up_right)
        if self.gate_up_bias is not None:
            bias = self.gate_up_bias[...]
            y = y + (bias.swapaxes(0, 1)[:, None] if self.per_sequence else bias)
        return self.activated(y, axis=2)

    def project(self, z: Float[Array, "b t f"]) -> Float[Array, "b t d"]:
        """The layer's output for given intermediates z."""
        own = self.down.shape[-2]
        others = None if self.rest is None else self.rest.project(z[..., own:])
        z = z[..., :own]
        product = matmul_of_each if self.per_sequence else matmul
        y = product(z, self.down[...], array_of(self.down_scale), array_of(self.down_row_scale))
        y = plus_matmul(y, z, self.down_left, self.down_right)
        y = y if others is None else y + others
        y = y if self.mask is None else self.mask.changed(z, y)
        return y if self.down_bias is None else y + self.down_bias[...]

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.project(self.intermediate(x))
