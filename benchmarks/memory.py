"""Compares the peak memory of a conversion with the promised limit: 1.5 times the largest tensor, plus 1 GiB.

This writes a sharded checkpoint of Llama's shape with random weights, converts it in a separate process, and compares
the peak resident memory of that process (VmHWM on Linux, otherwise maxrss) with the limit: 1.5 times the largest tensor
in the target dtype, plus 1 GiB, plus what the interpreter with all its imports had before the first tensor. Everything
is deleted afterwards. The exit code is 1 if the limit does not hold. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from griffin_jax.checkpoints.native import DTYPES

GIB = 1 << 30
STEP = 1 << 22
"""Number of random values that are drawn at a time."""

SHAPES = [(128256, 4096, 14336, 8, 128), (32000, 2048, 5632, 4, 64), (4096, 256, 768, 2, 32), (64, 16, 24, 1, 8)]
"""Vocabulary, width, neurons, key/value heads and head size of models with fewer and fewer parameters."""

NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

CONVERSION = """
import dataclasses, json, sys, warnings
from griffin_jax import convert
warnings.simplefilter("ignore")
report = convert(sys.argv[1], sys.argv[2], sys.argv[3], progress=False)
print(json.dumps(dataclasses.asdict(report), default=str))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gigabytes", type=float, default=8.0, metavar="N", help="size of the checkpoint (default: %(default)s)"
    )
    parser.add_argument("--shards", type=int, default=8, metavar="N", help="number of files (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="target dtype (default: %(default)s)")
    parser.add_argument("--stored", choices=DTYPES, default="bfloat16", help="stored dtype (default: %(default)s)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="working folder (default: that of temporary files)")


def run(options: argparse.Namespace) -> int:
    if not 0 < options.gigabytes < 10_000 or options.shards < 1:
        raise ValueError("--gigabytes must be above 0, and --shards at least 1")
    parent = options.folder or Path(tempfile.gettempdir())
    if not parent.is_dir():
        raise FileNotFoundError(f"--folder: there is no folder {parent}")
    config, shapes = model_of(options.gigabytes * 1e9, jnp.dtype(options.stored).itemsize)
    count = sum(map(math.prod, shapes.values()))
    size, target = (count * jnp.dtype(dtype).itemsize for dtype in (options.stored, options.dtype))
    free = shutil.disk_usage(parent).free
    if free < 1.02 * (size + target):
        raise OSError(
            f"{parent}: {(size + target) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; see --folder"
        )
    with tempfile.TemporaryDirectory(prefix="griffin-jax-memory-", dir=parent) as folder:
        source = Path(folder) / "source"
        write_checkpoint(source, config, shapes, options.stored, options.shards)
        report = _convert(source, Path(folder) / "native", options.dtype)
    peak, before, largest = report["peak_memory"], report["memory_before"], report["largest_bytes"]
    if peak is None:
        raise RuntimeError("this platform does not tell how much memory a process used")
    limit = int(1.5 * largest) + GIB + before
    holds = peak <= limit
    print(
        f"{size / 1e9:.2f} GB of {options.stored} in {options.shards} files -> {target / 1e9:.2f} GB of {options.dtype}"
    )
    for name, value in {
        "largest tensor": largest,
        "interpreter before the first tensor": before,
        "peak resident memory": peak,
        "limit (1.5 x largest + 1 GiB + interpreter)": limit,
    }.items():
        print(f"  {name:<44} {value / 1e6:>9,.0f} MB")
    print(f"  the limit {'holds' if holds else 'DOES NOT HOLD'}; converted in {report['seconds']:.0f} s")
    result = {
        "stored": options.stored, "dtype": options.dtype, "shards": options.shards, "bytes": size,
        "target_bytes": target, "largest_bytes": largest, "memory_before": before, "peak_memory": peak,
        "limit": limit, "holds": holds, "seconds": report["seconds"],
    }  # fmt: skip
    print(json.dumps(result))
    return 0 if holds else 1


def model_of(size: float, itemsize: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config.json and the tensors' shapes of a Llama model of at least `size` bytes."""
    vocabulary, width, neurons, groups, head = next(
        shape for shape in SHAPES if 4 * shape[0] * shape[1] * itemsize < size or shape is SHAPES[-1]
    )
    ends = {
        "model.embed_tokens.weight": (vocabulary, width),
        "lm_head.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    layer = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (groups * head, width),
        "self_attn.v_proj.weight": (groups * head, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (neurons, width),
        "mlp.up_proj.weight": (neurons, width),
        "mlp.down_proj.weight": (width, neurons),
    }
    values, of_layer = (sum(map(math.prod, shapes.values())) for shapes in (ends, layer))
    layers = max(1, math.ceil((size / itemsize - values) / of_layer))
    config = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": neurons,
        "num_hidden_layers": layers, "num_attention_heads": width // head, "num_key_value_heads": groups,
        "head_dim": head, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    blocks = {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    return config, {"model.embed_tokens.weight": ends.pop("model.embed_tokens.weight"), **blocks, **ends}


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str, num_shards: int
) -> None:
    """Write a Hugging Face folder of random weights, with memory for only a few million of them at a time."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    itemsize = jnp.dtype(dtype).itemsize
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
    total = sum(sizes.values())
    ends = itertools.accumulate(sizes.values())
    shards: dict[int, list[str]] = {}
    for name, end in zip(sizes, ends, strict=True):
        shards.setdefault((end - 1) * num_shards // total, []).append(name)
    files = {f"model-{n:05}-of-{len(shards):05}.safetensors": names for n, names in enumerate(shards.values(), 1)}
    random = np.random.default_rng(0)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", delay=0.5) as bar:
        for file, names in files.items():
            with (folder / file).open("wb") as out:
                out.write(_header({name: shapes[name] for name in names}, dtype))
                for piece in _values(random, sum(sizes[name] for name in names) // itemsize):
                    out.write(piece.astype(dtype).tobytes())
                    bar.update(len(piece) * itemsize)
                os.fsync(out.fileno())
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _values(random: np.random.Generator, count: int) -> Iterator[np.ndarray]:
    for start in range(0, count, STEP):
        yield (random.random(min(STEP, count - start), np.float32) - 0.5) * 0.04


def _convert(source: Path, output: Path, dtype: str) -> dict[str, Any]:
    """The report of a conversion in a separate process, whose memory nothing else increases."""
    command = [sys.executable, "-c", CONVERSION, str(source), str(output), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the conversion failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
