"""Libraries of adapters: clusters of texts, with an adapter for each cluster, one of which answers each prompt.

A library is a folder, so that its adapters can be trained wherever the base model is, each from its own shard of the
text and independently of the others:

    library.safetensors     centroids, how texts are embedded, and typical texts of each cluster
    shards/007.jsonl        the texts of a cluster
    training/007/           checkpoints of an adapter that is not finished
    adapters/007/           the adapter, in PEFT's format
    priors/007.safetensors  optional: what the base model's neurons do in these texts
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from griffin_jax.adapters.adapter import Adapter
from griffin_jax.adapters.embedding import Embedder, EmbeddingConfig
from griffin_jax.adapters.peft import WEIGHTS, load_adapter
from griffin_jax.extensions.prior import Prior
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.transformer import Transformer
from griffin_jax.text.tokenizer import Tokenizer
from griffin_jax.utils.arrayfile import load_arrays, save_arrays
from griffin_jax.utils.wholefile import hidden_folder

LIBRARY_FORMAT = "griffin_jax library 1"
LIBRARY = "library.safetensors"

TYPICAL, EXCERPT = 3, 160
"""Number of typical texts of each cluster, and of the characters that are shown of each."""

RESTARTS = 10
"""Number of times that k-means is started; the best result counts."""

Method = Literal["kmeans", "random"]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A summary of a cluster.

    Attributes:
        count: number of texts.
        typical: the beginnings of the texts that are nearest to the centroid.
    """

    count: int
    typical: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Library:
    """Clusters of texts, and the folder with their texts, adapters and priors.

    Attributes:
        folder: folder of the library.
        centroids: mean embedding of the texts of each cluster.
        clusters: a summary of each cluster.
        embedding: options of how texts are embedded.
        model: fingerprint of the base model.
        method: `kmeans`; or `random`, which deals texts and prompts out by a hash, as a baseline for clusters.
    """

    folder: Path
    centroids: Float[np.ndarray, "n d"]
    clusters: tuple[Cluster, ...]
    embedding: EmbeddingConfig
    model: str
    method: Method = "kmeans"

    def __len__(self) -> int:
        return len(self.clusters)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Library:
        """Load the library in a folder.

        Raises:
            FileNotFoundError: the folder has no library.
            ValueError: the library is damaged.
        """
        path = Path(folder) / LIBRARY
        arrays, metadata = load_arrays(path, LIBRARY_FORMAT)
        try:
            centroids = arrays["centroids"]
            described = json.loads(metadata["clusters"])
            clusters = tuple(Cluster(each["count"], tuple(each["typical"])) for each in described)
            embedding = EmbeddingConfig(**json.loads(metadata["embedding"]))
            if centroids.ndim != 2 or len(centroids) != len(clusters) or not np.isfinite(centroids).all():
                raise ValueError(f"{len(clusters)} clusters with centroids of the shape {centroids.shape}")
            method = metadata["method"]
            if method not in ("kmeans", "random"):
                raise ValueError(f"its method is {method!r}")
            return cls(Path(folder), centroids, clusters, embedding, metadata["model"], method)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def check(self, model: str) -> None:
        """Raise `ValueError` unless this library is for the given model.

        Args:
            model: the model's `griffin_jax.model.fingerprint.fingerprint`.
        """
        if model != self.model:
            raise ValueError(
                f"the library {self.folder} is of model {self.model}, the model is {model}: its weights or their dtype"
                " are others"
            )

    def nearest(self, embeddings: Float[np.ndarray, "b d"]) -> Int[np.ndarray, "b"]:
        """The number of the cluster whose centroid is nearest to each embedding."""
        distances = np.square(embeddings[:, None].astype(np.float64) - self.centroids[None]).sum(-1)
        return distances.argmin(axis=1)

    def route(self, embedder: Embedder, sequences: Sequence[Sequence[int]]) -> Int[np.ndarray, "b"]:
        """The number of the cluster of each sequence of token ids."""
        if self.method == "random":
            return np.asarray([dealt(sequence, len(self)) for sequence in sequences])
        return self.nearest(embedder(sequences))

    def embedder(self, model: Transformer, tokenizer: Tokenizer | None = None) -> Embedder:
        """The embedder for this library.

        Args:
            model: the base.
            tokenizer: tokenizer of the model; only needed if sentence-transformers embeds texts for this library.

        Raises:
            ImportError: the library needs sentence-transformers, which is not installed.
        """
        return Embedder(self.embedding, model, tokenizer)

    def shard(self, number: int) -> Path:
        """Path of the file with the texts of a cluster."""
        return self._part("shards", number, ".jsonl")

    def texts(self, number: int) -> list[str]:
        """The texts of a cluster.

        Raises:
            FileNotFoundError: the file with the texts does not exist.
        """
        path = self.shard(number)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}, with the texts of cluster {number}")
        return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]

    def adapter_folder(self, number: int) -> Path:
        """Folder in which the adapter of a cluster is, or will be."""
        return self._part("adapters", number)

    def prior_file(self, number: int) -> Path:
        """File in which the prior of a cluster is, or will be."""
        return self._part("priors", number, ".safetensors")

    def _part(self, kind: str, number: int, suffix: str = "") -> Path:
        if not 0 <= number < len(self):
            raise ValueError(f"cluster {number} is none of 0 to {len(self) - 1}")
        return self.folder / kind / f"{number:03}{suffix}"

    def trained(self) -> list[int]:
        """The numbers of the clusters whose adapters are finished."""
        return [number for number in range(len(self)) if self.adapter_folder(number).is_dir()]

    @property
    def adapter_bytes(self) -> int:
        """The most bytes that an adapter takes in memory: the size of the largest file; 0 if none is trained."""
        files = [self.adapter_folder(number) / WEIGHTS for number in self.trained()]
        return max((file.stat().st_size for file in files if file.is_file()), default=0)

    def adapter(self, number: int, config: ModelConfig) -> Adapter:
        """The adapter of a cluster. Adapters that were read are cached.

        Raises:
            FileNotFoundError: the adapter is not trained yet.
            ValueError: the adapter is damaged.
        """
        folder = self.adapter_folder(number)
        if not folder.is_dir():
            raise FileNotFoundError(f"cluster {number} has no adapter yet: griffin-jax moin train {self.folder}")
        return _load(folder.absolute(), config)

    def prior(self, number: int) -> Prior:
        """The prior of a cluster.

        Raises:
            FileNotFoundError: the prior has not been measured.
            ValueError: the prior is damaged.
        """
        if not self.prior_file(number).is_file():
            raise FileNotFoundError(f"cluster {number} has no prior: griffin-jax moin prior {self.folder}")
        return Prior.load(self.prior_file(number))


@functools.lru_cache(maxsize=64)
def _load(folder: Path, config: ModelConfig) -> Adapter:
    return load_adapter(folder, config)


def dealt(sequence: Sequence[int], count: int) -> int:
    """A pseudo-random number below `count`: a hash of the tokens, which depends on nothing else."""
    return int.from_bytes(hashlib.sha256(np.asarray(sequence, np.int32).tobytes()).digest()[:8], "big") % count


def find_clusters(
    embeddings: Float[np.ndarray, "n d"], count: int, *, seed: int = 0
) -> tuple[Float[np.ndarray, "c d"], Int[np.ndarray, "n"]]:
    """Cluster texts by k-means: the centroids, the cluster with the most texts first, and the cluster of each text.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: there are fewer texts than clusters.
    """
    if len(embeddings) < count:
        raise ValueError(f"{len(embeddings)} texts cannot be in {count} clusters")
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("clusters need scikit-learn: pip install 'griffin-jax[moin]'") from error
    means: Any = KMeans(count, n_init=RESTARTS, random_state=seed)  # pyright: ignore[reportArgumentType]
    labels = means.fit_predict(embeddings.astype(np.float64))
    order = np.argsort(-np.bincount(labels, minlength=count), kind="stable")
    place = np.empty(count, int)
    place[order] = np.arange(count)
    return means.cluster_centers_[order].astype(np.float32), place[labels]


def make_library(
    folder: str | os.PathLike[str],
    texts: Sequence[str],
    sequences: Sequence[Sequence[int]],
    embedder: Embedder,
    model: str,
    *,
    count: int,
    method: Method = "kmeans",
    seed: int = 0,
    quiet: bool = False,
) -> Library:
    """Divide texts into clusters, and write the folder of a library without adapters, whole or not at all.

    Args:
        folder: folder to write; it must not exist yet.
        texts: texts that the adapters will be trained on.
        sequences: token ids of each text.
        embedder: embedder for the texts.
        model: fingerprint of the base model.
        count: number of clusters.
        method: `kmeans`, or `random` to deal the texts out by a hash instead.
        seed: seed of k-means.
        quiet: whether to hide the progress bar.

    Raises:
        FileExistsError: the folder exists already.
        ImportError: scikit-learn is not installed.
        ValueError: there are fewer texts than clusters, or a cluster would have no texts.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already; choose another place or delete it first")
    embeddings = embedder.of_texts(texts) if embedder.reads_text else embedder(sequences, quiet=quiet)
    if method == "random":
        labels = np.asarray([dealt(sequence, count) for sequence in sequences])
        if len(np.unique(labels)) < count:
            raise ValueError(f"{len(texts)} texts are too few to be dealt out to {count} clusters")
        centroids = np.stack([embeddings[labels == number].mean(axis=0) for number in range(count)])
    else:
        centroids, labels = find_clusters(embeddings, count, seed=seed)
    clusters = []
    for number in range(count):
        members = np.flatnonzero(labels == number)
        near = np.square(embeddings[members] - centroids[number]).sum(-1).argsort(kind="stable")[:TYPICAL].tolist()
        typical = tuple(" ".join(texts[int(members[place])][: 2 * EXCERPT].split())[:EXCERPT] for place in near)
        clusters.append(Cluster(len(members), typical))
    with hidden_folder(folder) as partial:
        library = Library(partial, centroids, tuple(clusters), embedder.config, model, method)
        (partial / "shards").mkdir()
        for number in range(count):
            lines = [json.dumps({"text": texts[index]}) + "\n" for index in np.flatnonzero(labels == number).tolist()]
            library.shard(number).write_text("".join(lines), encoding="utf-8")
        metadata = {
            "model": model,
            "method": method,
            "embedding": json.dumps(dataclasses.asdict(embedder.config)),
            "clusters": json.dumps([dataclasses.asdict(cluster) for cluster in clusters]),
        }
        save_arrays(partial / LIBRARY, LIBRARY_FORMAT, {"centroids": centroids}, metadata)
        os.rename(partial, folder)
    return dataclasses.replace(library, folder=folder)
