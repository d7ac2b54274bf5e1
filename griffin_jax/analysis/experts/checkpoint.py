"""Matrices of experts, read from a checkpoint one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from jaxtyping import Float, Num

from griffin_jax.checkpoints.sources import FLOATS, Source
from griffin_jax.model.config import ModelConfig

BLOCK_BYTES = 32 << 20
"""Bytes of float32 numbers that are computed with at a time."""


class Experts(Protocol):
    """The interface that the analyses of weights read.

    Attributes:
        layers: numbers of the layers that have routed experts.
        kinds: the matrices that an expert has: up, gate and down, or up and down if it has no gate.
    """

    layers: tuple[int, ...]
    kinds: tuple[str, ...]

    def matrix(self, layer: int, kind: str) -> Num[np.ndarray, "e f d"]:
        """One matrix of all experts of a layer, with a row for each neuron."""
        ...

    def router(self, layer: int) -> Float[np.ndarray, "e d"]:
        """The router of a layer, with a row for each expert; float32."""
        ...


def kinds_of(config: ModelConfig) -> tuple[str, ...]:
    """The kinds of matrices that an expert has."""
    return ("up", "gate", "down") if config.gated else ("up", "down")


class StoredExperts:
    """The experts of a checkpoint; only the matrix that is asked for is read into memory.

    Args:
        source: an opened checkpoint.

    Raises:
        ValueError: the model of the checkpoint has no routed experts.
    """

    def __init__(self, source: Source):
        config = source.config
        if config.routing is None:
            raise ValueError(f"{source.name}: has no routed experts, so that its weights alone have nothing to compare")
        self._source = source
        self.layers = tuple(layer for layer in range(config.num_layers) if config.routed(layer))
        self.kinds = kinds_of(config)

    def matrix(self, layer: int, kind: str) -> Num[np.ndarray, "e f d"]:
        """The matrix in its stored dtype if that is a float of 16 or 32 bits, else in float32."""
        path = f"layers.{layer}.ff.experts.{kind}"
        stored = FLOATS.get(self._source.origin(path).dtype)
        narrow = stored is not None and stored.itemsize <= 4
        return self._source.read(path, stored if stored is not None and narrow else np.dtype(np.float32))

    def router(self, layer: int) -> Float[np.ndarray, "e d"]:
        return self._source.read(f"layers.{layer}.ff.router", np.dtype(np.float32))


class RandomExperts:
    """Experts of one layer before any training, as large as those of a model: normal numbers of variance 1 / fan-in.

    Args:
        config: configuration of the model.
        seed: seed of the numbers.
    """

    layers: tuple[int, ...] = (0,)

    def __init__(self, config: ModelConfig, seed: int):
        assert config.routing is not None
        self._shape = (config.routing.experts, config.routing.width, config.width)
        self._seed = seed
        self.kinds = kinds_of(config)

    def matrix(self, layer: int, kind: str) -> Num[np.ndarray, "e f d"]:
        experts, neurons, width = self._shape
        rng = np.random.default_rng((self._seed, self.kinds.index(kind)))
        scale = np.float32(1 / math.sqrt(neurons if kind == "down" else width))
        # In half precision, cosines of random numbers are just as near to zero.
        array = np.empty(self._shape, np.float16)
        for expert in range(experts):
            array[expert] = rng.standard_normal((neurons, width), dtype=np.float32) * scale
        return array

    def router(self, layer: int) -> Float[np.ndarray, "e d"]:
        experts, _, width = self._shape
        rng = np.random.default_rng((self._seed, len(self.kinds)))
        return rng.standard_normal((experts, width), dtype=np.float32) / np.float32(math.sqrt(width))


def blocks(matrix: Num[np.ndarray, "e f d"]) -> Iterator[Float[np.ndarray, "e _n"]]:
    """Flattened experts in float32, some columns at a time."""
    flat = matrix.reshape(len(matrix), -1)
    step = max(1, BLOCK_BYTES // (4 * len(matrix)))
    for start in range(0, flat.shape[1], step):
        yield flat[:, start : start + step].astype(np.float32)
