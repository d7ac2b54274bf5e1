"""Writes quantised_examples.json: small matrices as other packages quantise them, and what these read in them.

Not run by the tests. With torch 2.13.0, bitsandbytes 0.50.2, compressed-tensors 0.20.1 and the source of autoawq 0.2.9:

    python tests/unit/checkpoints/quantised_examples.py autoawq-0.2.9/awq/utils/packing_utils.py

Of each example there is its quantization_config, its parts, and what the package makes of them, in float32; of an array
the dtype by its name in safetensors, the shape, and the bytes in base64.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams

OUTPUTS, INPUTS, GROUP = 16, 64, 32

DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32",
    torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def awq_packing(file: str) -> Any:
    """The module of AutoAWQ that unpacks words, without the rest of the package."""
    spec = importlib.util.spec_from_file_location("packing_utils", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def columns(packing: Any) -> dict[str, dict[str, Any]]:
    """Words of AWQ, and the same in the order of GPTQ, into which AutoAWQ turns them for exllama's kernels."""
    qweight = torch.randint(-(2**31), 2**31 - 1, (INPUTS, OUTPUTS // 8), dtype=torch.int32)
    zeros = torch.randint(0, 16, (INPUTS // GROUP, OUTPUTS), dtype=torch.int32)
    places = torch.tensor(packing.AWQ_ORDER)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    qzeros = (zeros.reshape(-1, OUTPUTS // 8, 8)[..., places] << shifts).sum(-1).to(torch.int32)
    scales = torch.rand(INPUTS // GROUP, OUTPUTS).half()
    expected = packing.dequantize_gemm(qweight, qzeros, scales.float(), 4, GROUP).T
    awq = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
    other, other_zeros = packing.unpack_reorder_pack(qweight, qzeros, 4)
    return {
        "awq": {"config": awq, "qweight": qweight, "qzeros": qzeros, "scales": scales, "expected": expected},
        "gptq": {"config": gptq, "qweight": other, "qzeros": other_zeros, "scales": scales, "expected": expected},
    }


def compressed(name: str, format: str, weights: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A matrix as compressed-tensors stores it."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    matrix = torch.randn(OUTPUTS, INPUTS)
    blocks: tuple[int, int] = {
        "group": (1, args.group_size), "tensor_group": (1, args.group_size), "channel": (1, INPUTS),
        "tensor": (OUTPUTS, INPUTS), "block": tuple(args.block_structure or ()),
    }[args.strategy]  # fmt: skip
    cut = matrix.reshape(OUTPUTS // blocks[0], blocks[0], INPUTS // blocks[1], blocks[1])
    least, most = cut.amin((1, 3)), cut.amax((1, 3))
    kept: dict[str, Any] = {"weight": matrix}
    if args.strategy == "tensor_group":
        kept["weight_global_scale"] = (448 * 6 / matrix.abs().max()).reshape(1)
        scale, zero = calculate_qparams(least, most, args, global_scale=kept["weight_global_scale"])
    else:
        scale, zero = calculate_qparams(least, most, args)
    kept |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(format)
    parts = compressor.compress(kept, scheme)
    if format == "nvfp4-pack-quantized":
        # It decompresses to bfloat16.
        numbers = unpack_fp4_from_uint8(parts["weight_packed"], OUTPUTS, INPUTS, torch.float32)
        stored = parts["weight_scale"].float(), None, args, torch.float32, parts["weight_global_scale"]
        expected = dequantize(numbers, *stored)
    else:
        expected = compressor.decompress(parts, scheme)["weight"]
    group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
    config = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    return {name: {"config": config, **parts, "expected": expected}}


def four_bits(name: str, kind: str, inputs: int = INPUTS, **options: Any) -> dict[str, dict[str, Any]]:
    """A matrix as bitsandbytes stores it in 4 bits."""
    matrix = torch.randn(OUTPUTS, inputs)
    numbers, state = functional.quantize_4bit(matrix, blocksize=64, quant_type=kind, **options)
    parts = {"weight": numbers} | {f"weight.{end}": part for end, part in state.as_dict(packed=True).items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    expected = functional.dequantize_4bit(numbers, state)
    return {name: {"config": config, **parts, "expected": expected}}


def eight_bits() -> dict[str, dict[str, Any]]:
    """A matrix as bitsandbytes stores it in 8 bits."""
    numbers, largest, _ = functional.int8_vectorwise_quant(torch.randn(OUTPUTS, INPUTS).half())
    expected = functional.int8_vectorwise_dequant(numbers, largest)
    config = {"load_in_8bit": True}
    layout = torch.tensor(0, dtype=torch.uint8)
    return {
        "int8": {"config": config, "weight": numbers, "SCB": largest, "weight_format": layout, "expected": expected}
    }


def main() -> None:
    torch.manual_seed(0)
    integers = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    floats = {"num_bits": 8, "type": "float"}
    examples = {
        **columns(awq_packing(sys.argv[1])),
        **compressed("packed", "pack-quantized", integers),
        **compressed("packed-zeros", "pack-quantized", {**integers, "symmetric": False}),
        **compressed("packed-rows", "pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        **compressed("integers", "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        **compressed(
            "integers-zeros", "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
        ),
        **compressed("floats", "float-quantized", {**floats, "strategy": "channel"}),
        **compressed("floats-one-scale", "float-quantized", {**floats, "strategy": "tensor"}),
        **compressed("floats-blocks", "float-quantized", {**floats, "strategy": "block", "block_structure": [8, 32]}),
        **compressed(
            "nvfp4",
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
        **four_bits("nf4", "nf4"),
        **four_bits("nf4-nested", "nf4", compress_statistics=True),
        # With blocks that end within rows.
        **four_bits("fp4", "fp4", INPUTS + 32),
        **four_bits("nf4-floats", "nf4", quant_storage=torch.float32),
        **eight_bits(),
    }
    written = {
        name: {
            "config": parts.pop("config"),
            "expected": as_json(parts.pop("expected").float()),
            "parts": {end: as_json(part) for end, part in parts.items()},
        }
        for name, parts in examples.items()
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")


def as_json(tensor: Any) -> dict[str, Any]:
    tensor = tensor.detach().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "base64": base64.b64encode(data).decode()}


if __name__ == "__main__":
    main()
