"""Verification: whether a converted model computes what transformers and PyTorch compute with the original."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from griffin_jax.checkpoints.planning import narrowing
from griffin_jax.checkpoints.pytorch import import_torch, reference_logits
from griffin_jax.checkpoints.sources import FLOATS, Source
from griffin_jax.model.cache import empty_cache
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import WeightFormat

LENGTHS = (1, 9, 40)
"""Lengths of the sequences that are compared, in tokens, as far as the model's context allows."""

BATCH = 2
"""Number of sequences of each length."""

# Tolerances relative to the largest logit. Both sides compute in float32, so where the conversion kept the stored
# values, only the order of additions differs: some 1e-6 for each of many layers, far below what a wrong tensor does.
EXACT = 1e-4
# Where the conversion rounded the weights, each is off by up to 2**-9 of itself in bfloat16 and 2**-12 in float16.
# These errors are independent, so sums over many weights hardly amplify them, but every layer adds its own, and a deep
# network amplifies them: 20 times the rounding is seldom reached, and a wrong tensor exceeds it by far.
ROUNDED = {"bfloat16": 20 * 2**-9, "float16": 20 * 2**-12, "float32": EXACT}


class VerificationError(Exception):
    """Raised where a conversion does not compute what its source computes.

    Attributes:
        verification: what was found.
    """

    def __init__(self, verification: Verification):
        super().__init__(str(verification))
        self.verification = verification


@dataclasses.dataclass(frozen=True)
class Verification:
    """How the logits of a native folder compare with those of the torch model.

    Attributes:
        folder: the folder that was checked.
        source: name of the model that it was compared with.
        difference: largest absolute difference of two logits.
        largest: largest absolute value of a logit.
        where: where the largest difference is, in words.
        agreement: share of positions at which both have the same most probable token.
        positions: number of positions that were compared.
        tolerance: largest allowed value of `relative`, which depends on the dtypes.
    """

    folder: Path
    source: str
    difference: float
    largest: float
    where: str
    agreement: float
    positions: int
    tolerance: float

    @property
    def relative(self) -> float:
        """The largest difference in units of the largest logit."""
        return self.difference / self.largest if self.largest else float(self.difference > 0)

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.relative <= self.tolerance  # and not, if it is NaN

    def __str__(self) -> str:
        found = (
            f"{self.relative:.1e} of the largest logit apart at most (allowed: {self.tolerance:.1e}), most probable "
            f"tokens equal at {self.agreement:.1%} of {self.positions} positions"
        )
        if self.ok:
            return f"{self.folder}: verified against PyTorch's {self.source}: {found}"
        return (
            f"{self.folder}: does NOT compute what {self.source} computes in PyTorch: {found}. The largest difference "
            f"is {self.difference:.3g} {self.where}"
        )


def check_verifiable(source: Source, weights: WeightFormat | None = None) -> None:
    """Refuse what cannot be verified, before anything is converted.

    Args:
        source: what is converted.
        weights: how the matrices of the conversion are stored.

    Raises:
        ImportError: torch is not installed.
        ValueError: transformers cannot read the source, or integers are wanted.
    """
    if weights is not None and weights.quantised:
        raise ValueError(
            f"{weights} rounds by design, and PyTorch has the values before: verify a conversion without --weights, and"
            " measure what the rounding costs with griffin-jax eval"
        )
    import_torch("verifying a conversion")
    if source.reference() is None:
        raise ValueError(
            f"{source.name}: is a native folder, which PyTorch cannot read, so there is nothing to compare with; "
            "verify the conversion of the Hugging Face folder or GGUF file"
        )


def verify_source(source: Source, folder: Path) -> Verification:
    """Compare a native folder with the opened source it was converted from.

    A few random sequences of tokens, always the same ones, go through both models in float32, with one model in memory
    at a time.

    Raises:
        ImportError: torch is not installed.
        ValueError: the folder is of another model or holds integers, or transformers cannot load the source.
    """
    from griffin_jax.checkpoints.native import NativeCheckpoint

    native = NativeCheckpoint(folder)
    check_verifiable(source, native.precision.weights)
    if native.config != source.config:
        raise ValueError(f"{folder}: is not a conversion of {source.name}, their configurations differ")
    random = np.random.default_rng(0)
    lengths = sorted({min(length, source.config.max_positions) for length in LENGTHS})
    batches = [random.integers(0, source.config.vocab_size, (BATCH, length)).astype(np.int32) for length in lengths]
    expected = reference_logits(source.name, source.reference() or {}, batches)
    kind = native.precision.weights.dtype
    # What quantised weights stand for is float32, which is rounded, too.
    quantised = any(source.origin(path).dtype not in FLOATS for path in source.shapes)
    rounded = quantised or narrowing(source, native.precision) is not None
    return _compare(folder, source.name, our_logits(folder, batches), expected, ROUNDED[kind] if rounded else EXACT)


def our_logits(folder: Path, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits of every batch, (B, T, V), by the native folder in float32."""
    from griffin_jax.checkpoints.loading import load_model

    model, _ = load_model(folder, "float32")
    # Accelerators may multiply float32 in lower precision otherwise.
    with jax.default_matmul_precision("highest"):
        return [np.asarray(dense_logits(model, batch)) for batch in batches]


@jax.jit
def dense_logits(model: Transformer, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
    """Logits after every token of sequences without padding, float32."""
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    hidden, _, _ = model(tokens, positions, empty_cache(model.config, batch, length, model.dtype), read_slots=0)
    return model.logits(hidden)


def _compare(
    folder: Path, source: str, ours: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float
) -> Verification:
    worst, where, largest, agreeing, positions = -1.0, "", 0.0, 0, 0
    for mine, theirs in zip(ours, expected, strict=True):
        if mine.shape != theirs.shape:
            raise ValueError(f"{folder}: logits have the shape {mine.shape}, those of {source} {theirs.shape}")
        with np.errstate(all="ignore"):
            difference = np.nan_to_num(np.abs(mine - theirs), nan=np.inf)
        row, position, token = np.unravel_index(difference.argmax(), difference.shape)
        if difference.max() > worst:
            worst = float(difference.max())
            where = (
                f"for token {token} at position {position} of sequence {row} of {mine.shape[1]} tokens: "
                f"{mine[row, position, token]:.6g} here, {theirs[row, position, token]:.6g} there"
            )
        largest = max(largest, float(np.abs(theirs).max()))
        agreeing += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        positions += mine.shape[0] * mine.shape[1]
    return Verification(folder, source, worst, largest, where, agreeing / positions, positions, tolerance)
