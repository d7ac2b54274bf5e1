"""Embeddings of texts: the mean of the residual stream of a text's first tokens after the model's first layers.

    e = mean_t x_t / ||x_t||,  divided by its norm        x_t the residual stream after L layers, t < P

Each token counts the same, as in GRIFFIN's statistic; without the division, the first token of a text would dominate,
since its residual stream has a larger norm than all others. The layers are those of the base, without any adapter, so
that a text has the same embedding before and after adapters are trained.

A prompt must be embedded before it is read with its adapter. The base and the adapted model compute different things,
so nothing of this pass can be kept except the embedding. It therefore has to be cheap, with few layers and a bounded
number of tokens. With no layers at all, the embedding is the mean of the token embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from griffin_jax.generation.padding import bucket, pad
from griffin_jax.model.cache import EMPTY, empty_cache
from griffin_jax.model.positions import layer_positions
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import mesh_of, over_data, to_host
from griffin_jax.text.tokenizer import Tokenizer
from griffin_jax.utils import programs
from griffin_jax.utils.options import option, whole

BATCH = 8
"""Number of texts that are embedded at a time."""


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """Options of how texts are embedded.

    Attributes:
        layers: number of the model's first layers that are used.
        tokens: largest number of a text's first tokens that are used.
        model: name of a model of sentence-transformers that embeds instead; None for none.

    Raises:
        ValueError: a value is outside its range.
    """

    layers: int = option(8, "number of the model's first layers that embed a text", metavar="L")
    tokens: int = option(64, "largest number of a text's first tokens that are embedded", metavar="P")
    model: str | None = option(
        None, "a model of sentence-transformers that embeds instead (pip install sentence-transformers)",
        type=str, metavar="NAME",
    )  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", whole("layers", self.layers, 0))
        object.__setattr__(self, "tokens", whole("tokens", self.tokens, 1))


def embed(
    model: Transformer, tokens: Int[Array | np.ndarray, "b t"], lengths: Int[Array | np.ndarray, "b"], layers: int
) -> Float[Array, "b d"]:
    """The embedding of each text, with norm 1, float32. Only the first `layers` layers are computed.

    Args:
        model: the base, without an adapter.
        tokens: the texts, padded on the right with any token.
        lengths: number of real tokens of each text, at least 1.
        layers: number of the model's first layers that are used; static.

    Raises:
        ValueError: the model has fewer layers, or has an adapter.
    """
    if layers > len(model.layers):
        raise ValueError(f"texts are to be embedded by {layers} layers, and the model has {len(model.layers)}")
    if model.adapted:
        raise ValueError("texts are embedded by the base: give what `detach` returns")
    mesh = mesh_of(model.embedding[...])
    ids, counts = over_data(mesh, jnp.asarray(tokens)), over_data(mesh, jnp.asarray(lengths))
    columns = jnp.arange(ids.shape[1], dtype=jnp.int32)
    real = columns < counts[:, None]
    positions = jnp.where(real, columns, EMPTY)
    cache = empty_cache(model.config, ids.shape[0], ids.shape[1], model.dtype)
    at = layer_positions(model.config, positions, cache, 0)
    x = jnp.where(real[..., None], model.embed(ids, positions), 0)
    for number in range(layers):
        given = at[number], cache.keys[number], cache.values[number], cache.cursor
        x, _, _, _ = model.layers[number](x, real, *given, None)
        x = jnp.where(real[..., None], x, 0)
    return _unit(jnp.sum(_unit(x.astype(jnp.float32)), axis=1))


def _unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


_embed = programs.jit(embed, static_argnames=("layers",))


class Embedder:
    """Embeds texts as a config says.

    Args:
        config: options of the embedding.
        model: the base, without an adapter.
        tokenizer: tokenizer of the model. Only a model of sentence-transformers needs it, to turn token ids into text.

    Raises:
        ImportError: the config names a model of sentence-transformers, which is not installed.
        ValueError: the model has fewer layers than the config says.
    """

    def __init__(self, config: EmbeddingConfig, model: Transformer, tokenizer: Tokenizer | None = None):
        if config.model is None and config.layers > len(model.layers):
            raise ValueError(
                f"texts are to be embedded by {config.layers} layers, and the model has {len(model.layers)}"
            )
        self.config, self._model, self._tokenizer = config, model, tokenizer
        self._sentences: Any = None
        if config.model is not None:
            try:
                from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                raise ImportError(f"embedding by {config.model} needs sentence-transformers; install it") from error
            self._sentences = SentenceTransformer(config.model)

    @property
    def reads_text(self) -> bool:
        """Whether text is embedded instead of token ids."""
        return self._sentences is not None

    def __call__(self, sequences: Sequence[Sequence[int]], *, quiet: bool = True) -> Float[np.ndarray, "n d"]:
        """The embedding of each sequence of token ids, float32, independent of the other sequences.

        Args:
            sequences: token ids of each text, at least one.
            quiet: whether to hide the progress bar.

        Raises:
            ValueError: a model of sentence-transformers embeds, and there is no tokenizer.
        """
        if self.reads_text:
            if self._tokenizer is None:
                raise ValueError(f"{self.config.model} embeds texts, and there is no tokenizer to make these of tokens")
            return self.of_texts([self._tokenizer.decode(list(sequence)) for sequence in sequences])
        cut = [sequence[: self.config.tokens] for sequence in sequences]
        width, found = bucket(max(map(len, cut))), []
        for start in tqdm(range(0, len(cut), BATCH), unit="batch", desc="embedding", disable=quiet or None):
            few = cut[start : start + BATCH]
            size = BATCH if len(cut) > BATCH else len(few)
            tokens, lengths = pad([*few, *[few[-1]] * (size - len(few))], width)
            found.append(to_host(_embed(self._model, tokens, lengths, layers=self.config.layers))[: len(few)])
        return np.concatenate(found)

    def of_texts(self, texts: Iterable[str]) -> Float[np.ndarray, "n d"]:
        """The embedding of each text by sentence-transformers, float32, with norm 1."""
        found = self._sentences.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)
