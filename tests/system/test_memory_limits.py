"""What is predicted of memory against what processes with the demo model really take."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints_gguf import qwen_moe_fields

from griffin_jax.checkpoints import native
from griffin_jax.checkpoints.families import families
from griffin_jax.checkpoints.schema.family import rules_by_path
from griffin_jax.checkpoints.schema.layouts import sizes_of
from griffin_jax.model.assembly import parameter_shapes, random_model
from griffin_jax.model.config import ModelConfig

MEASURE = """
import json, sys
import jax
import jax.numpy as jnp
from griffin_jax.checkpoints.loading import open_source
from griffin_jax.cli import main
from griffin_jax.llm.llm import load
from griffin_jax.llm.memory import Needs
from griffin_jax.model.weights import Precision
from griffin_jax.utils import memory

model, case, options, texts, output = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4], sys.argv[5]
config = open_source(model).config
kept = [config.ff_width // 2] * config.num_layers
jnp.ones(3).block_until_ready()
before = memory.resident()
needs = Needs(config, Precision.of("float32"))
if case == "generate":
    batch, shared = options["batch"], options["shared"]
    parts = needs.generation(batch, 512, 64, kept, shared=shared)
    prompts = [[3 + (7 * row + column * (row + 1)) % 900 for column in range(512)] for row in range(batch)]
    load(model).generate(prompts, max_new_tokens=64, shared=shared, ignore_eos=True)
elif case == "logits":
    parts = needs.logits(1, 4000, options["prompt"])
    load(model).logits([[5 + i % 900 for i in range(4000)]], prompt_length=options["prompt"]).block_until_ready()
else:
    file = texts + (".txt" if case == "perplexity" else ".jsonl")
    lengths = options["prompt"], options["new"]
    arguments = ["--prompt-tokens", str(lengths[0]), "--new-tokens", str(lengths[1]), "--batch", str(options["batch"])]
    parts = needs.scoring(options["batch"], *lengths, 5, answers=case == "divergence")
    assert main.main(["eval", case, file, "--model", model, "--output", output, *arguments]) == 0
print(json.dumps({"before": before, "parts": parts, "peak": memory.peak()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("generate", {"batch": 1, "shared": False}),
        ("generate", {"batch": 8, "shared": True}),
        ("generate", {"batch": 8, "shared": False}),
        ("logits", {"prompt": 2000}),
        ("divergence", {"batch": 4, "prompt": 256, "new": 128}),
        ("perplexity", {"batch": 4, "prompt": 512, "new": 256}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_predictions_are_bounds(demo_gguf, tmp_path, case, options):
    """No process takes more than is predicted, and predictions are at most half as much again, plus Python itself."""
    words = ("The bridge was built of iron, and the river under it is slow. " * 80).strip()
    (tmp_path / "texts.txt").write_text(f"{words}\n" * 4, encoding="utf-8")
    lines = [json.dumps({"text": f"Text {number}. {words}"}) for number in range(4)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Programs are what users' are: the other tests compile for eight devices, and with less effort.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    arguments = [str(demo_gguf), case, json.dumps(options), str(tmp_path / "texts"), str(tmp_path / "output")]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    predicted = found["before"] + sum(found["parts"].values())
    print(f"{case} {options}: {found['peak'] / 1e6:,.0f} MB, predicted {predicted / 1e6:,.0f} MB: {found['parts']}")
    assert found["peak"] <= predicted <= 1.5 * found["peak"] + found["before"]


LOAD = """
import json, sys
from griffin_jax.checkpoints.loading import load_model
from griffin_jax.utils import memory

small, large = sys.argv[1:]
# Libraries and programs are there when it is measured.
load_model(small, "float32")
before = memory.resident()
memory.reset_peak()
load_model(large, "float32")
print(json.dumps(memory.peak() - before))
"""


@pytest.mark.thorough
def test_loading_takes_little_more_than_the_weights(tmp_path):
    """Arrays are read some at a time and dropped when they are assembled, and so are never all in memory twice.

    How much is read before the last arrays are dropped varies by tens of megabytes, which is much for so small a model:
    the least of three loads counts.
    """
    config = ModelConfig("llama", 1000, 512, 1536, 10, 8, 8, 64, 256)
    native.save(random_model(dataclasses.replace(config, num_layers=1)), tmp_path / "small")
    native.save(random_model(config), tmp_path / "large")
    weights = sum(4 * math.prod(shape) for shape in parameter_shapes(config).values())
    ratios: list[float] = []
    while len(ratios) < 3 and min(ratios, default=9) > 1.4:
        ran = subprocess.run(
            [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")],
            env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        ratios.append(json.loads(ran.stdout) / weights)
    print(f"{ratios} times the weights of {weights / 1e6:.0f} MB")
    assert min(ratios) <= 1.4


CONVERT = """
import sys, warnings
from griffin_jax.checkpoints.loading import convert
warnings.simplefilter("ignore")
report = convert(sys.argv[1], sys.argv[2], weights=sys.argv[3], progress=False)
print(report.largest_bytes, report.peak_memory - report.memory_before)
"""

EXPERTS = {
    "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 4096,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip
"""Layers of Qwen3-30B-A3B."""


def sparse_safetensors(folder: Path, layers: int) -> Path:
    """A model of zeros in bfloat16, one file for each layer, that takes no room on the disk."""
    folder.mkdir()
    values = EXPERTS | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(values))
    config = families()["qwen3_moe"].model_config(values, "config.json")
    sizes, listed = sizes_of(config), {}
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    rules = rules_by_path(families()["qwen3_moe"].rules, config)
    for path in parameter_shapes(config):
        file = f"model-{path.split('.')[1] if path.startswith('layers.') else 'rest'}.safetensors"
        for name, shape in rules[path].tensors(sizes).items():
            files.setdefault(file, {})[name] = shape
            listed[name] = file
    for file, shapes in files.items():
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        packed = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(packed)) + packed)
            opened.truncate(8 + len(packed) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder


def sparse_gguf(file: Path, layers: int) -> Path:
    """The same as a GGUF file in Q8_0."""
    values = EXPERTS | {"num_hidden_layers": layers}
    config = families()["qwen3_moe"].model_config(values, "config.json")
    family = families()["qwen3_moe"].gguf
    assert family is not None
    writer = gguf.GGUFWriter(file, "qwen3moe")
    for name, value in qwen_moe_fields(values).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    rules, size = rules_by_path(family.rules, config), 0
    for path in parameter_shapes(config):
        for name, shape in rules[path].tensors(sizes_of(config)).items():
            kind = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else "Q8_0"]
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            taken = math.prod(shape) // block * block_bytes
            stored = (*shape[:-1], shape[-1] // block * block_bytes) if block > 1 else shape
            dtype = np.dtype(np.float32 if block == 1 else np.uint8)
            writer.add_tensor_info(name, stored, dtype, taken, raw_dtype=None if block == 1 else kind)
            size += -(-taken // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("r+b") as opened:
        begin = opened.seek(0, os.SEEK_END)
        opened.truncate(-(-begin // 32) * 32 + size)
    return file


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "weights"), [("safetensors", "bfloat16"), ("safetensors", "int8"), ("GGUF", "int8")])
def test_conversions_of_experts(tmp_path, kind, weights):
    """Of models of 8 GB: half a GiB less than what all conversions promise, which is 1.5 x largest tensor + 1 GiB.

    More is taken where the memory that TensorStore's threads have freed is not given back: 1.1 to 1.8 GB of GGUF files.
    """
    if kind == "GGUF":
        source = sparse_gguf(tmp_path / "model.gguf", layers=12)
        size = source.stat().st_size
    else:
        source = sparse_safetensors(tmp_path / "hf", layers=6)
        size = sum(file.stat().st_size for file in source.iterdir())
    assert size > 8e9
    ran = subprocess.run(
        [sys.executable, "-c", CONVERT, str(source), str(tmp_path / "native"), weights],
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    shutil.rmtree(tmp_path / "native", ignore_errors=True)
    assert ran.returncode == 0, ran.stderr
    largest, used = map(int, ran.stdout.split())
    print(f"{kind} of {size / 1e9:.1f} GB to {weights}: {used / 1e6:,.0f} MB, largest tensor {largest / 1e6:,.0f} MB")
    limit = 1.5 * largest + (1 << 29)
    assert limit < size / 4
    assert used < limit


resource = pytest.importorskip("resource")
STARTED = """
import jax, jax.numpy as jnp
from griffin_jax.cli import analyze, bench, chat, evaluate, flocking, generate, prior
jax.jit(lambda x: (x @ x).sum())(jnp.ones((8, 8))).block_until_ready()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")))
"""
REQUESTS = """
import sys
import griffin_jax as gj

llm = gj.load(sys.argv[1])
long = [5 + i % 900 for i in range(2000)]
for prompts, options in [
    ([long] * 8, {}),
    ([long[:200]] * 32, {"density": 0.9}),
    ([long[:400]] * 4, {"refit": 400}),
    ([long] * 4, {"speculative": 4}),
    ([long] * 4, {"refresh_every": 8}),
]:
    try:
        llm.generate(prompts, **options)
    except MemoryError as error:
        print(error)
"""


def limited(megabytes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What Python does with these arguments and this much more address space than JAX needs to start."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = {"capture_output": True, "text": True, "check": False, "env": environment, "input": "Hello\n"}
    started = subprocess.run([sys.executable, "-c", STARTED], **command)
    most = (int(started.stdout) << 10) + (megabytes << 20)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    return subprocess.run([sys.executable, *arguments], preexec_fn=limit, **command)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the address space")
class TestAddressSpace:
    """Nothing is killed, aborts or prints a traceback: what does not fit is refused before it is begun."""

    @pytest.mark.parametrize("megabytes", [100, 600, 900])
    @pytest.mark.parametrize(
        "command", ["generate", "chat", "eval divergence", "prior", "flocking", "analyze", "bench"]
    )
    def test_commands_say_so_in_one_line(self, demo_gguf, tmp_path, command, megabytes):
        (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "It is slow. " * 200}) + "\n", encoding="utf-8")
        texts, output = str(tmp_path / "texts.jsonl"), ["--output", str(tmp_path / "output")]
        more = {
            "generate": ["--prompt", "It is"],
            "chat": [],
            "eval divergence": [texts, *output],
            "prior": ["--text", texts, *output],
            "flocking": [texts, *output],
            "analyze": [str(demo_gguf), texts, *output],
            "bench": ["--prompt", "64", "--new", "16"],
        }[command]
        model = [] if command == "analyze" else ["--model", str(demo_gguf)]
        arguments = ["-m", "griffin_jax.cli.main", *command.split(), *model, *more]
        ran = limited(megabytes, *arguments)
        # A chat that has begun goes on after a turn that does not fit; what it takes to begin depends on the machine.
        begun = command == "chat" and megabytes > 100 and ran.returncode == 0
        assert ran.returncode == (0 if begun else 2), ran.stderr
        (line,) = (ran.stdout if begun else ran.stderr).splitlines()
        assert "JAX cannot start in the" in line or " are needed (" in line
        assert not (ran.stderr if begun else ran.stdout)

    def test_requests_are_refused_by_what_they_need(self, demo_gguf):
        ran = limited(1200, "-c", REQUESTS, str(demo_gguf))
        assert ran.returncode == 0, ran.stderr
        lines = ran.stdout.splitlines()
        assert len(lines) == 5
        assert all(line.startswith("about ") and " are needed (" in line for line in lines)
