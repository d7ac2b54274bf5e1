"""What `quantization_config` of a config.json says: how tensors are stored in parts, and where each begins."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from griffin_jax.checkpoints.quantised import mxfp4
from griffin_jax.checkpoints.quantised.columns import Awq, Gptq
from griffin_jax.checkpoints.quantised.four_bits import WEIGHT, FourBits
from griffin_jax.checkpoints.quantised.mxfp4 import Mxfp4
from griffin_jax.checkpoints.quantised.parts import Packed, Parts, Read, UnfitError
from griffin_jax.checkpoints.quantised.scaled import FP8, packed_numbers, rows_of_int8, whole_numbers
from griffin_jax.checkpoints.schema.family import method_of
from griffin_jax.checkpoints.sources import TensorInfo, listed_names

OF_ACTIVATIONS = (
    r".*\.(input|output|activation|[qkv])_(global_)?(scale|scale_inv|zero_point)", r".*\.weight_(format|shape)",
)  # fmt: skip
"""Tensors that say how activations and caches are rounded, which they are not here, or what others say as well."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of tensor in parts.

    Attributes:
        end: end of the name of the part with its numbers.
        dtypes: dtypes of that part.
        of: function that gives the tensor, or raises `UnfitError`.
        axes: the least number of axes of that part.
    """

    end: str
    dtypes: tuple[str, ...]
    of: Callable[[Parts], Packed]
    axes: int = 2


def kinds_of(config: Mapping[str, Any], where: str) -> list[Kind]:
    """The kinds of tensors that a checkpoint may have.

    Args:
        config: its `quantization_config`; empty if it has none.
        where: what to call the checkpoint in messages.

    Raises:
        ValueError: the configuration asks for what is not read.
    """
    method = method_of(config)
    read = METHODS.get(method)
    try:
        # Blocks of MXFP4 are known by their names alone.
        return [_MXFP4, *(read(config) if read else [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"needs {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{where}: quantization_config of {method}: {said}; use the unquantised model") from error


def join(
    tensors: Mapping[str, TensorInfo], kinds: list[Kind], read: Read
) -> tuple[dict[str, TensorInfo], dict[str, Packed]]:
    """Take the parts of each tensor for one.

    Args:
        tensors: what is stored.
        kinds: what to look for.
        read: function that reads rows of a stored tensor.

    Returns:
        The tensors, with those that were joined instead of their parts; and these, by name.

    Raises:
        ValueError: parts do not fit; one message lists them.
    """
    joined, packed, problems = dict(tensors), {}, {}
    for name, info in tensors.items():
        for kind in kinds:
            if not name.endswith(kind.end) or info.dtype not in kind.dtypes or len(info.shape) < kind.axes:
                continue
            parts = Parts(name.removesuffix(kind.end), tensors, read)
            try:
                tensor = kind.of(parts)
            except UnfitError as error:
                problems.setdefault(error.problem, []).append(error.what)
                break
            for part in tensor.parts:
                joined.pop(part, None)
            joined[tensor.name] = tensor.info
            packed[tensor.name] = tensor
            break
    if problems:
        listed = (text for problem, names in problems.items() for text in listed_names(problem, names))
        raise ValueError(f"parts of quantised tensors do not fit: {'; '.join(listed)}")
    return joined, packed


def _gptq(config: Mapping[str, Any]) -> list[Kind]:
    form = config.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format is {form!r}, allowed are 'gptq' and 'gptq_v2'")
    read = functools.partial(
        Gptq.of, bits=int(config["bits"]), group=_group(config["group_size"]), one_less=form == "gptq"
    )
    return [Kind(".qweight", ("I32",), read)]


def _awq(config: Mapping[str, Any]) -> list[Kind]:
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit"))
    if version != "gemm" or bits != 4 or config.get("zero_point") is False:
        raise ValueError(
            f"version is {version!r} with {bits} bits and zero_point {config.get('zero_point')}, allowed is 'gemm' with"
            " 4 bits and zeros"
        )
    group = config["group_size"] if "group_size" in config else config["q_group_size"]
    return [Kind(".qweight", ("I32",), functools.partial(Awq.of, group=_group(group)))]


def _group(size: Any) -> int | None:
    """Inputs that share a scale; None for all of them, which is written as -1."""
    size = int(size)
    if size == 0 or size < -1:
        raise ValueError(f"group_size is {size}, allowed are -1 and positive numbers")
    return None if size == -1 else size


def _fp8(config: Mapping[str, Any]) -> list[Kind]:
    return [Kind(".weight", FP8, functools.partial(whole_numbers, block=_block(config.get("weight_block_size"))))]


def _block(sizes: Any) -> tuple[int, int] | None:
    if sizes is None:
        return None
    outputs, inputs = map(int, sizes.split("x") if isinstance(sizes, str) else sizes)
    if min(outputs, inputs) < 1:
        raise ValueError(f"blocks are {sizes}, allowed are two positive numbers")
    return outputs, inputs


def _compressed_tensors(config: Mapping[str, Any]) -> list[Kind]:
    if config.get("transform_config"):
        raise ValueError("weights are rotated (transform_config), which is not read")
    sparsity = (config.get("sparsity_config") or {}).get("format") or "dense"
    if sparsity != "dense":
        raise ValueError(f"weights are stored sparsely as {sparsity!r}, which is not read")
    weights = [group["weights"] for group in config["config_groups"].values() if group.get("weights")]
    bits = {int(each["num_bits"]) for each in weights if each.get("type", "int") == "int"}
    blocks = {_block(each.get("block_structure")) for each in weights} - {None}
    block = blocks.pop() if len(blocks) == 1 else None
    return [
        Kind(".weight_packed", ("I32", "U8"), functools.partial(packed_numbers, bits=bits, block=block)),
        Kind(".weight", (*FP8, "I8"), functools.partial(whole_numbers, block=block)),
    ]


def _bitsandbytes(config: Mapping[str, Any]) -> list[Kind]:
    return [Kind(WEIGHT, ("U8",), FourBits.of), Kind(WEIGHT, ("I8",), rows_of_int8)]


_MXFP4 = Kind(mxfp4.BLOCKS, ("U8",), Mxfp4.of, axes=3)

METHODS: dict[str | None, Callable[[Mapping[str, Any]], list[Kind]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
}
"""How `quantization_config` is read, by `quant_method`; the names are `schema.family.QUANTISATIONS`."""
