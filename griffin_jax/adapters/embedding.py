"""Where a text lies among others: the mean of what the model's first layers make of its first tokens.

    e = mean_t x_t / ||x_t||,  divided by its norm        x_t the residual stream after L layers, t < P

Each token counts the same, as in GRIFFIN's statistic: the residual stream of a text's first token is longer than all
others. The layers are those of the base, without any adapter, so that a text has the same place before and after there
are adapters.

A prompt must be embedded before it is read with its adapter, and what the base made of it is not what the adapted model
makes: nothing of it can be kept but the embedding. So it has to be cheap, which few layers and a bounded number of
tokens are. With no layers at all it is the mean of token embeddings.
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
"""Texts that are embedded at a time."""


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """What a text is embedded by.

    Attributes:
        layers: of the model, from the first on.
        tokens: of the text, from the first on, at most.
        model: name of a model of sentence-transformers that embeds instead.

    Raises:
        ValueError: a value is outside its range.
    """

    layers: int = option(8, "layers of the model that a text is embedded by", metavar="L")
    tokens: int = option(64, "first tokens of a text that it is embedded by, at most", metavar="P")
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
    """The embedding of each text, of length 1, float32. Under jit the layers after the last one are not computed.

    Args:
        model: without adapter.
        tokens: the texts, padded on the right with any token.
        lengths: number of real tokens of each, at least 1.
        layers: how many of the model's layers, static.

    Raises:
        ValueError: the model has fewer layers, or an adapter.
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
        config: by what.
        model: the base, without adapter.
        tokenizer: of the model, for a model of sentence-transformers to read what tokens say.

    Raises:
        ImportError: sentence-transformers is asked for and not installed.
        ValueError: the model has fewer layers.
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
        """Whether texts are embedded, not token ids."""
        return self._sentences is not None

    def __call__(self, sequences: Sequence[Sequence[int]], *, quiet: bool = True) -> Float[np.ndarray, "n d"]:
        """The embedding of each sequence of token ids, float32; it does not depend on the others.

        Args:
            sequences: each of at least one token.
            quiet: no progress bar.

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
        """The embedding of each text by sentence-transformers, float32, of length 1."""
        found = self._sentences.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)
