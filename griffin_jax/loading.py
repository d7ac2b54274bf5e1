"""One door for all models: what a user names becomes a model, or a checkpoint in the native format.

open_source   a name or path -> where the weights come from; reads configuration and headers only
load_model    ... -> the model on the device, and its tokenizer
convert       ... -> a folder in the native format, with memory for one tensor at a time
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from griffin_jax import checkpoint, demo
from griffin_jax.assembly import assemble
from griffin_jax.checkpoint import DTYPES, MANIFEST, PARAMETERS, NativeCheckpoint
from griffin_jax.model import Transformer
from griffin_jax.sources import FamilySource, GgufFile, HuggingFaceFolder, Source, read_hf_config
from griffin_jax.tokenizer import Tokenizer, check_fits

__all__ = [
    "ConversionReport",
    "add_arguments",
    "assemble",
    "convert",
    "load_model",
    "open_source",
    "parse_dtype",
    "run",
]

SOURCES = (
    "a folder that `griffin-jax convert` wrote, a Hugging Face folder (config.json and safetensors), a GGUF file, "
    f"the id of a Hugging Face repository (owner/name), or {demo.NAME!r}"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = [
    "config.json", "generation_config.json", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
]  # fmt: skip
HUB_WEIGHTS = ["model.safetensors", "model-*.safetensors"]


def open_source(source: str | Path) -> Source:
    """Find a model and check that it can be loaded, without reading its weights.

    Args:
        source: a native folder, a Hugging Face folder, a GGUF file, a Hugging Face repository or the
            demo model. What exists on the disk comes first.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it is not a supported model, or its files are malformed.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return _open_folder(path)
    if path.exists():
        if path.suffix == ".safetensors":
            raise ValueError(f"{path}: give the folder that holds it together with config.json")
        return FamilySource(GgufFile(path))
    name = str(source)
    if name == demo.NAME:
        return FamilySource(GgufFile(demo.fetch()))
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return FamilySource(HuggingFaceFolder(_from_hub(name)))
    raise FileNotFoundError(f"there is no model {name!r}; give {SOURCES}")


def _open_folder(folder: Path) -> Source:
    if (folder / MANIFEST).exists() or any(folder.glob(f"{PARAMETERS}*")):
        return NativeCheckpoint(folder)
    if not (folder / "config.json").exists() and (files := sorted(folder.glob("*.gguf"))):
        raise ValueError(f"{folder}: has no config.json; did you mean {files[0]}?")
    return FamilySource(HuggingFaceFolder(folder))


def _from_hub(name: str) -> Path:
    """The local copy of a repository. Its configuration comes first, so that an unsupported model costs no download."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        read_hf_config(Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES)))
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES + HUB_WEIGHTS))
    except GatedRepoError as error:
        raise ValueError(
            f"{name}: its licence must be accepted on its page of the Hugging Face hub, and `hf auth login` done"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name!r}, and no such repository on the Hugging Face hub; give {SOURCES}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name!r}, it is not in the cache of the Hugging Face hub, and the hub cannot be "
            f"reached; give {SOURCES}"
        ) from error
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{name}: cannot be downloaded ({type(error).__name__}: {error})") from error


def parse_dtype(dtype: str | jnp.dtype | None) -> np.dtype | None:
    """A dtype of weights by its name; None stays None.

    Raises:
        ValueError: it is not one that weights can have.
    """
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    return np.dtype(jnp.dtype(name))


def load_model(source: str | Path, dtype: str | jnp.dtype | None = None) -> tuple[Transformer, Tokenizer | None]:
    """A model ready to run, and its tokenizer if one lies with it.

    Args:
        source: see `open_source`.
        dtype: of the weights: float32, bfloat16 or float16. By default float32 on CPUs, which are
            several times slower with anything narrower, and bfloat16 on accelerators.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: the dtype is not allowed, the model not supported, its files malformed or its
            weights not finite, or the tokenizer does not fit.
    """
    wanted = parse_dtype(dtype)
    if wanted is None:
        wanted = np.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    opened = open_source(source)
    tokenizer = _fitting_tokenizer(opened)
    return assemble(opened.config, opened.parameters(wanted), jnp.dtype(wanted)), tokenizer


def _fitting_tokenizer(source: Source) -> Tokenizer | None:
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        try:
            check_fits(tokenizer, source.config)
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}") from error
    return tokenizer


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        path: the folder it wrote.
        dtype: of the weights in it.
        tensors: how many parameters.
        bytes: their size.
        largest_bytes: size of the largest of them.
        seconds: how long it took.
        memory_before: largest resident memory of the process up to the start, in bytes; None where
            the platform does not tell.
        peak_memory: the same up to the end.
    """

    path: Path
    dtype: str
    tensors: int
    bytes: int
    largest_bytes: int
    seconds: float
    memory_before: int | None
    peak_memory: int | None

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.tensors} tensors, {self.bytes / 1e6:,.1f} MB in {self.dtype}, in {self.seconds:.1f} s"
        ]
        if self.peak_memory is not None and self.memory_before is not None:
            lines.append(
                f"peak memory {self.peak_memory / 1e6:,.0f} MB, of which {self.memory_before / 1e6:,.0f} MB before the "
                f"first tensor; the largest tensor has {self.largest_bytes / 1e6:,.1f} MB"
            )
        return "\n".join(lines)


def convert(
    source: str | Path, output: str | Path, dtype: str | jnp.dtype | None = None, progress: bool = True
) -> ConversionReport:
    """Write a model in the native format, tensor by tensor.

    Args:
        source: see `open_source`.
        output: a folder that does not exist yet. It appears when it is complete.
        dtype: of the weights: float32, bfloat16 or float16. By default that of most of the source's
            weights, float32 where they are quantised.
        progress: whether to show a progress bar on stderr.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: there is nothing of the name `source`.
        ValueError: see `load_model`.
        OSError: the disk is full, or `output` cannot be written.
    """
    from tqdm import tqdm

    start = time.perf_counter()
    folder = checkpoint.check_free(output)
    wanted = parse_dtype(dtype)
    opened = open_source(source)
    wanted = opened.dtype if wanted is None else wanted
    tokenizer = _fitting_tokenizer(opened)
    sizes = {path: int(np.prod(shape)) * wanted.itemsize for path, shape in opened.shapes.items()}
    before = _peak_memory()
    total = sum(sizes.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc=folder.name, delay=0.5) as bar:

        def read(path: str) -> np.ndarray:
            array = opened.read(path, wanted)
            bar.update(sizes[path])
            return array

        checkpoint.write(folder, opened.config, opened.shapes, wanted, read, tokenizer, source=opened.name)
    return ConversionReport(
        path=folder,
        dtype=wanted.name,
        tensors=len(sizes),
        bytes=total,
        largest_bytes=max(sizes.values()),
        seconds=time.perf_counter() - start,
        memory_before=before,
        peak_memory=_peak_memory(),
    )


def _peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the convert command takes."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCES)
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must not exist yet")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights; by default that of most of the source's weights, float32 where they are quantised",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the convert command and print what it did.

    Raises:
        ValueError: see `convert`.
        OSError: likewise.
    """
    print(convert(arguments.source, arguments.output, arguments.dtype))
