"""What `quantization_config` of a config.json says: how tensors are stored in parts, and where each begins."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from griffin_jax.checkpoints.quantised import mxfp4, scaled
from griffin_jax.checkpoints.quantised.columns import Awq, Gptq
from griffin_jax.checkpoints.quantised.four_bits import SCALES, FourBits
from griffin_jax.checkpoints.quantised.mxfp4 import Mxfp4
from griffin_jax.checkpoints.quantised.parts import WEIGHT, Packed, Parts, Read, UnfitError
from griffin_jax.checkpoints.quantised.scaled import FP8, nvfp4, packed_numbers, rows_of_int8, whole_numbers
from griffin_jax.checkpoints.schema.family import method_of
from griffin_jax.checkpoints.sources import TensorInfo, listed_names
from griffin_jax.utils.messages import brief

BESIDE = (
    r".*\.((prob_)?output|input|activation|act|kv|[qkv])_(global_)?(scale|scale_inv|scale_ub|zero_point)",
    r".*\.weight_(shape|format)",
)
"""Tensors beside quantised ones: how activations and caches are rounded, which they are not here, and what is looked at
where parts are joined."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of tensor in parts.

    Attributes:
        end: end of the name of the part with its numbers.
        dtypes: dtypes of that part.
        of: function that gives the tensor, or raises `UnfitError`.
        axes: the least number of axes of that part.
        unless: end of the name of a part that another kind has; None if no other one looks the same.
    """

    end: str
    dtypes: tuple[str, ...]
    of: Callable[[Parts], Packed]
    axes: int = 2
    unless: str | None = None

    def begins(self, name: str, stored: Mapping[str, TensorInfo]) -> bool:
        """Whether a stored tensor is the part with the numbers of such a one."""
        info, base = stored[name], name.removesuffix(self.end)
        looks = name.endswith(self.end) and info.dtype in self.dtypes and len(info.shape) >= self.axes
        return looks and (self.unless is None or base + self.unless not in stored)


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
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, KeyError):
            said = f"needs {error}"
        elif isinstance(error, ValueError):
            said = str(error)
        else:
            said = f"malformed, its values do not go together ({brief(error)})"
        raise ValueError(f"{where}: quantization_config of {method}: {said}; use the unquantised model") from error


def join(
    tensors: Mapping[str, TensorInfo], kinds: list[Kind], read: Read, needless: Callable[[str], bool]
) -> tuple[dict[str, TensorInfo], dict[str, Packed]]:
    """Take the parts of each tensor for one.

    Args:
        tensors: what is stored.
        kinds: what to look for.
        read: function that reads rows of a stored tensor.
        needless: whether a tensor of this name is not read anyway, so that its parts need not fit.

    Returns:
        The tensors, with those that were joined instead of their parts; and these, by name.

    Raises:
        ValueError: parts do not fit; one message lists them.
    """
    joined, packed, problems = dict(tensors), {}, {}
    for name in tensors:
        kind = next((kind for kind in kinds if kind.begins(name, tensors)), None)
        if kind is None:
            continue
        parts = Parts(name.removesuffix(kind.end), tensors, read)
        try:
            tensor = kind.of(parts)
        except UnfitError as error:
            if not needless(parts.base + WEIGHT):
                problems.setdefault(error.problem, []).append(error.what)
            continue
        for part in tensor.parts:
            joined.pop(part, None)
        if tensor.name in joined:
            problems.setdefault("duplicate", []).append(f"{tensor.name}, quantised and not")
        joined[tensor.name] = tensor.info
        packed[tensor.name] = tensor
    if problems:
        listed = (text for problem, names in problems.items() for text in listed_names(problem, names))
        raise ValueError(f"parts of quantised tensors do not fit: {'; '.join(listed)}")
    return joined, packed


def _gptq(config: Mapping[str, Any]) -> list[Kind]:
    form = _said(config, "checkpoint_format", "format", default="gptq")
    if form not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format is {form!r}, allowed are 'gptq' and 'gptq_v2'")
    if (words := _said(config, "pack_dtype", default="int32")) != "int32":
        raise ValueError(f"pack_dtype is {words!r}, allowed is 'int32'")
    read = functools.partial(
        Gptq.of,
        bits=int(config["bits"]),
        group=_group(config["group_size"]),
        one_less=form == "gptq",
        dynamic=bool(config.get("dynamic")),
    )
    return [Kind(".qweight", ("I32",), read)]


def _awq(config: Mapping[str, Any]) -> list[Kind]:
    version = _said(config, "version", "format", default="gemm")
    bits, group = (config[old] if config.get(new) is None else config[new] for new, old in AWQ_NAMES)
    if version != "gemm" or int(bits) != 4:
        raise ValueError(f"version is {version!r} with {bits} bits, allowed is 'gemm' with 4 bits")
    return [Kind(".qweight", ("I32",), functools.partial(Awq.of, group=_group(group)))]


def _said(config: Mapping[str, Any], *names: str, default: str) -> str:
    """The first of these attributes that there is, in lower case."""
    return str(next((config[name] for name in names if config.get(name)), default)).lower()


def _group(size: Any) -> int | None:
    """Inputs that share a scale; None for all of them, which is written as -1."""
    size = int(size)
    if size == 0 or size < -1:
        raise ValueError(f"group_size is {size}, allowed are -1 and positive numbers")
    return None if size == -1 else size


def _fp8(config: Mapping[str, Any]) -> list[Kind]:
    if config.get("weight_scale_semantics"):
        raise ValueError(f"weight_scale_semantics is {config['weight_scale_semantics']!r}, which is not read")
    block = _block(config.get("weight_block_size", FP8_BLOCK))
    return [Kind(WEIGHT, FP8, functools.partial(whole_numbers, blocks=[block] if block else []))]


def _fbgemm_fp8(config: Mapping[str, Any]) -> list[Kind]:
    return [Kind(WEIGHT, FP8, whole_numbers)]


def _block(sizes: Any) -> tuple[int, int] | None:
    if sizes is None:
        return None
    outputs, inputs = map(int, sizes.split("x") if isinstance(sizes, str) else sizes)
    if min(outputs, inputs) < 1:
        raise ValueError(f"blocks are {sizes}, allowed are two positive numbers")
    return outputs, inputs


def _compressed_tensors(config: Mapping[str, Any]) -> list[Kind]:
    # Within the configuration of a larger whole, the same attributes are one level deeper.
    inner = config.get("quantization_config") or config
    if inner.get("transform_config") or config.get("transform_config"):
        raise ValueError("weights are rotated (transform_config), which is not read")
    sparsity = _said(inner.get("sparsity_config") or config.get("sparsity_config") or {}, "format", default="dense")
    if sparsity != "dense":
        raise ValueError(f"weights are stored sparsely as {sparsity!r}, which is not read")
    groups = inner["config_groups"].values()
    for form in (_said(each, "format", default="dense") for each in (inner, *groups)):
        if form not in COMPRESSED:
            raise ValueError(f"format is {form!r}, allowed are {', '.join(COMPRESSED)}")
    stated = [group.get("weights") or {} for group in groups]
    blocks = [block for each in stated if (block := _block(each.get("block_structure")))]
    blocks += [(1, size) for each in stated if (size := int(each.get("group_size") or 0)) > 0]
    return [
        Kind(scaled.PACKED, ("I32",), functools.partial(packed_numbers, blocks=blocks)),
        Kind(scaled.PACKED, ("U8",), nvfp4),
        Kind(WEIGHT, (*FP8, "I8"), functools.partial(whole_numbers, blocks=blocks)),
    ]


def _bitsandbytes(config: Mapping[str, Any]) -> list[Kind]:
    return [Kind(SCALES, ("U8", "F32"), FourBits.of, axes=1), Kind(WEIGHT, ("I8",), rows_of_int8, unless=SCALES)]


AWQ_NAMES = (("bits", "w_bit"), ("group_size", "q_group_size"))
"""Attributes of AWQ's first configurations had other names."""

FP8_BLOCK = (128, 128)
"""Outputs and inputs that share a scale of FP8, if nothing is said."""

COMPRESSED = (
    "dense", "naive-quantized", "int-quantized", "float-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mixed-precision",
)  # fmt: skip
"""Formats of compressed-tensors that are read."""

_MXFP4 = Kind(mxfp4.BLOCKS, ("U8",), Mxfp4.of, axes=3)

METHODS: dict[str | None, Callable[[Mapping[str, Any]], list[Kind]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
}
"""How `quantization_config` is read, by `quant_method`; the names are `schema.family.QUANTISATIONS`."""
