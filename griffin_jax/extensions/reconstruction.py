"""Beyond GRIFFIN: the rows of the kept neurons are refitted to replace what the dropped ones did for the prompt.

    prefilled = prefill(model, tokens, lengths, max_new_tokens=N, rows=256)
    experts = select(prefilled.statistics, config)
    pruned = prune(model, experts, refit=Reconstruction(prefilled.rows))

The full model has read the prompt, so it is known what pruning takes away at each of the prompt's tokens t: the
residual r_t, which is the dropped neurons' part of the layer's output. Ridge regression over S tokens fits a change
Delta of the rows of the kept neurons E to these residuals:

    A = rows z_t[E] / ||z_t||   (S, K)        R = rows r_t / ||z_t||   (S, D)
    Delta = A^T (A A^T + mu I)^-1 R           W_down'[E] = W_down[E] + Delta

This is the dual form: the linear system has a row for each of S tokens, not for each of K neurons. All tokens have the
same weight, as in GRIFFIN's statistic. The shapes of the pruned model do not change, so decoding costs no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.model.feed_forward import LowRank
from griffin_jax.model.ops import float32_product, solve_positive_definite
from griffin_jax.parallel.mesh import mesh_of
from griffin_jax.utils import programs
from griffin_jax.utils.options import number

DEFAULT_ROWS = 256
"""Default for the largest number of tokens of a prompt that a reconstruction is fitted to."""

DEFAULT_CALIBRATION = 384
"""Default number of calibration rows that are added to the prompt's rows. More rows fit better, but cost more time for
every prompt."""

CALIBRATION_WEIGHT = 4096.0
"""Default weight of general text in the fit, as a number of prompt tokens."""

LEAST_RIDGE = 1e-3
"""Smallest ridge. With a smaller one, systems of a few thousand tokens could not be solved in float32."""


def check_ridge(ridge: object, weight: object) -> tuple[Any, Any]:
    """Returns the ridge of a fit and the weight of its calibration rows as Python numbers.

    Traced values, inside jit, were checked before.

    Raises:
        ValueError: a value is outside its range.
    """
    return (
        number("ridge", ridge, f"at least {LEAST_RIDGE} and finite", lambda ridge: ridge >= LEAST_RIDGE),
        number("weight of calibration rows", weight, "at least 0 and finite", lambda weight: weight >= 0),
    )


def rows_of_each(rows: int, batch: int, shared: bool) -> int:
    """The number of tokens to record of each sequence, so that each set of kept neurons is fitted to `rows` tokens.

    Args:
        rows: number of tokens for each set of kept neurons.
        batch: number of sequences.
        shared: whether the sequences share one set of kept neurons.
    """
    return -(-rows // batch) if shared else rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Reconstruction:
    """The refit that `prune` and `mask` take: which rows the kept neurons are fitted to, and how.

    Attributes:
        rows: relative activations of R tokens of every sequence, (B, R, F) for each layer, from `prefill`; rows of
            zeros are padding. Neurons that a batch shares are fitted to the rows of all its sequences together.
        ridge: lambda in mu = lambda * mean(diag(A A^T)), with the mean over the prompt's rows; at least `LEAST_RIDGE`.
            The larger it is, the smaller the change.
        calibration: rows that stand for general text, (C, F) for each layer, such as `Prior.rows`: their second moments
            are those of a token of general text. They keep the fit from following the prompt too closely. Empty for
            none.
        weight: weight of the squared errors of the calibration rows, where each of the prompt's rows has weight 1: the
            number of tokens of general text that they stand for.

    Raises:
        ValueError: `ridge` or `weight` is outside its range.
    """

    rows: tuple[Float[Array, "_b _r _f"], ...]
    ridge: float | Float[Array, ""] = 1.0
    calibration: tuple[Float[Array, "_c _f"], ...] = ()
    weight: float | Float[Array, ""] = CALIBRATION_WEIGHT

    def __post_init__(self) -> None:
        check_ridge(self.ridge, self.weight)

    def check(self, neurons: Sequence[int], indices: Sequence[Int[Array, "*b _k"]]) -> None:
        """Raise `ValueError` unless the rows fit a model's layers and the sequences of the kept neurons.

        Args:
            neurons: F of each layer of the full model.
            indices: the kept neurons of each layer, (K,) or (B, K).
        """
        if not self.rows:
            raise ValueError("there are no rows to fit to: prefill with rows=N, the number of tokens of each prompt")
        for name, found in (("rows", self.rows), ("calibration rows", self.calibration)):
            widths = [rows.shape[-1] for rows in found]
            if found and widths != list(neurons):
                raise ValueError(
                    f"{name} are of {len(widths)} layers with {sorted(set(widths))} neurons, the model has"
                    f" {len(neurons)} with {sorted(set(neurons))}"
                )
        batch = self.rows[0].shape[0]
        if indices[0].ndim == 2 and indices[0].shape[0] not in (1, batch):
            raise ValueError(f"rows are of {batch} sequences, experts of {indices[0].shape[0]}")

    def changes(
        self, down: Sequence[Float[Array, "_f d"]], indices: Sequence[Int[Array, "*b _k"]]
    ) -> list[Float[Array, "*b _k d"]]:
        """Delta of every layer, (K, D) or (B, K, D), float32: what to add to the kept rows of its down projection.

        Args:
            down: W_down of each layer of the full model, (F, D).
            indices: the kept neurons of each layer: (K,), or (B, K) with a row for every sequence.
        """
        shared = indices[0].ndim == 1
        kept, systems, targets = [], [], []
        for layer, (weight, index) in enumerate(zip(down, indices, strict=True)):
            system, target, rows = self._system(layer, weight, index[None] if shared else index)
            kept.append(rows)
            systems.append(system)
            targets.append(target)
        # The systems have the same shape in all layers, however many neurons these keep, and are solved together.
        on_mesh = mesh_of(down[0]) is not None
        solved = solve_positive_definite(jnp.stack(systems), jnp.stack(targets), on_mesh=on_mesh)
        changes = [float32_product("bsk,bsd->bkd", a, x) for a, x in zip(kept, solved, strict=True)]
        return [change[0] for change in changes] if shared else changes

    def low_rank(
        self, down: Sequence[Float[Array, "_f d"]], kept: Sequence[Bool[Array, "*b _f"]]
    ) -> list[tuple[LowRank, ...]]:
        """Delta of every layer as a sum of products rows^T X, for the prompt's rows and for those of general text.

        X = (A A^T + mu I)^-1 R has a row of D values for each of the rows. At the kept neurons, the sum is what
        `changes` gives (up to rounding); elsewhere it is meaningless.

        Args:
            down: W_down of each layer of the full model, (F, D).
            kept: which neurons of each layer are kept, (F,) for the whole batch or (B, F).
        """
        found = []
        for layer, (weight, is_kept) in enumerate(zip(down, kept, strict=True)):
            rows = self.rows[layer]
            if is_kept.ndim == 1:
                rows = rows.reshape(-1, rows.shape[-1])
            more = self.calibration[layer] if self.calibration else None
            # One layer after the other, so that memory is needed for one of them only. Their systems have the same
            # shape, so one program solves them all.
            own, general = _solution(
                rows, more, self.weight, self.ridge, weight, is_kept, on_mesh=mesh_of(weight) is not None
            )
            products = [LowRank(rows, own)]
            if more is not None and general is not None:
                products.append(LowRank(more, general))
            found.append(tuple(products))
        return found

    def _system(
        self, layer: int, weight: Float[Array, "f d"], index: Int[Array, "b k"]
    ) -> tuple[Float[Array, "b s s"], Float[Array, "b s d"], Float[Array, "b s k"]]:
        """A A^T + mu I, R and A of one layer; rows of padding are zero in all of them but mu I.

        Args:
            layer: number of the layer.
            weight: W_down of the layer.
            index: the kept neurons, (B, K), or (1, K) if the batch shares them.
        """
        rows = self.rows[layer]
        if index.shape[0] != rows.shape[0]:
            rows = rows.reshape(1, -1, rows.shape[-1])
        prompt = jnp.any(rows != 0, axis=-1)
        if self.calibration:
            rows = _with_calibration(rows, self.calibration[layer], self.weight)
        is_kept = jnp.put_along_axis(jnp.zeros((index.shape[0], rows.shape[-1]), bool), index, True, -1, inplace=False)
        a = jnp.take_along_axis(rows, index[:, None], axis=-1)
        if mesh_of(weight) is not None:
            system, target = _sums(rows, is_kept, weight)
        else:
            dropped = jnp.argsort(is_kept, axis=-1, stable=True)[:, : rows.shape[-1] - index.shape[-1]]
            others = jnp.take_along_axis(rows, dropped[:, None], axis=-1)
            target = float32_product("bse,bed->bsd", others, weight[dropped])
            system = float32_product("bsk,buk->bsu", a, a)
        return _with_ridge(system, prompt, self.ridge), target, a


def _with_calibration(
    rows: Float[Array, "b s f"], calibration: Float[Array, "c f"], weight: float | Float[Array, ""]
) -> Float[Array, "b sc f"]:
    """The rows of every sequence, followed by the weighted calibration rows."""
    more = (calibration.astype(jnp.float32) * jnp.sqrt(weight)).astype(rows.dtype)
    return jnp.concatenate([rows, jnp.broadcast_to(more, (rows.shape[0], *more.shape))], axis=1)


def _sums(
    rows: Float[Array, "b s f"], is_kept: Bool[Array, "b f"], weight: Float[Array, "f d"]
) -> tuple[Float[Array, "b s s"], Float[Array, "b s d"]]:
    """A A^T and R, without gathering rows of weights.

    On a mesh, each device sums over its own neurons, and only sums are exchanged.
    """
    target = _product("bsf,fd->bsd", jnp.where(is_kept[:, None], 0, rows), weight)
    of_kept = jnp.where(is_kept[:, None], rows, 0)
    return float32_product("bsf,buf->bsu", of_kept, of_kept), target


def _with_ridge(
    system: Float[Array, "b s s"], prompt: Bool[Array, "b r"], ridge: float | Float[Array, ""]
) -> Float[Array, "b s s"]:
    """A A^T + mu I. The prompt's rows come first; `prompt` tells which of them are not padding."""
    squares = jnp.diagonal(system, axis1=1, axis2=2)[:, : prompt.shape[1]]
    mean = jnp.sum(squares, axis=1) / jnp.maximum(jnp.sum(prompt, axis=1), 1).astype(squares.dtype)
    # If no kept neuron takes part in the prompt, there is nothing to fit, and any mu will do.
    mu = jnp.where(mean > 0, ridge * mean, 1.0)
    return system + mu[:, None, None] * jnp.eye(system.shape[-1], dtype=system.dtype)


@programs.jit(static_argnames="on_mesh")
def _solution(
    rows: Float[Array, "*b s f"],
    calibration: Float[Array, "c f"] | None,
    weight: float | Float[Array, ""],
    ridge: float | Float[Array, ""],
    down: Float[Array, "f d"],
    is_kept: Bool[Array, "*b f"],
    *,
    on_mesh: bool,
) -> tuple[Float[Array, "*b s d"], Float[Array, "*b c d"] | None]:
    """X of one layer, for the prompt's rows and for the calibration rows, to be multiplied by unweighted rows."""
    shared = is_kept.ndim == 1
    own = rows[None] if shared else rows
    every = own if calibration is None else _with_calibration(own, calibration, weight)
    system, target = _sums(every, is_kept[None] if shared else is_kept, down)
    system = _with_ridge(system, jnp.any(own != 0, axis=-1), ridge)
    x = solve_positive_definite(system[None], target[None], on_mesh=on_mesh)[0]
    parts = x[:, : own.shape[1]], None if calibration is None else x[:, own.shape[1] :] * jnp.sqrt(weight)
    return jax.tree.map(lambda part: part[0] if shared else part, parts)


def _product(equation: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of operands in the model's dtype, with additions and result in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
