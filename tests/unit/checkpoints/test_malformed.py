"""Settings that no model has: every one is refused in one line that names the file, and before any work is done."""

from __future__ import annotations

import copy
import functools
import struct
from typing import Any

import checkpoints
import pytest
from checkpoints_gguf import write_gguf
from conftest import every_and_slow

from griffin_jax.checkpoints.families import Family, families, family_of
from griffin_jax.checkpoints.loading import open_source
from griffin_jax.model.config import Alibi, ModelConfig, Rotary
from griffin_jax.utils.transformers_import import import_transformers

STRANGE: tuple[Any, ...] = (
    None, True, 0, -1, 2**31, 2**63, 10**400, 1e308, 0.5, float("nan"), float("inf"), -float("inf"), "", "x", "\ud800",
    [], {}, [1], [[]], [{}], {"a": 1}, ["x"] * 3, [2**70], [None], [float("nan")] * 4, {"rope_type": "yarn"},
    {"rope_type": []}, {"rope_type": "llama3", "factor": 0}, {"full_attention": 1}, {"full_attention": [], "x": {}},
)  # fmt: skip


@functools.cache
def usual(model_type: str) -> dict[str, Any]:
    values = import_transformers().AutoConfig.for_model(model_type).to_dict()
    return {**values, "model_type": model_type, **SMALL.get(model_type, {})}


# What the defaults leave out.
SMALL = {
    "llama": {"head_dim": None},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2},
    "glm4_moe": {"head_dim": 128},
}


def config_or_message(family: Family, values: dict[str, Any]) -> ModelConfig | str:
    try:
        return family.model_config(values, "config.json")
    except ValueError as error:
        return str(error)


# Some are only warned of: tokens outside the vocabulary, and what nothing reads.
@pytest.mark.filterwarnings("ignore::griffin_jax.utils.messages.CheckpointWarning")
@pytest.mark.parametrize("model_type", every_and_slow(4, *sorted(families())))
def test_strange_settings_of_every_family(model_type):
    family = family_of(model_type, "config.json")
    assert isinstance(config_or_message(family, usual(model_type)), ModelConfig)
    for name in usual(model_type):
        for value in STRANGE:
            values = copy.deepcopy(usual(model_type)) | {name: value}
            if name == "model_type":
                continue
            found = config_or_message(family, values)
            if isinstance(found, str):
                assert "config.json" in found
                assert len(found.splitlines()) == 1, found
                assert len(found) < 2000
            else:
                hash(found)
                assert found.num_layers <= 65536


@pytest.mark.parametrize("name", ["norm_eps", "attention_scale", "embedding_scale", "logit_softcap", "residual_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, "1", [1.0], True])
def test_numbers_of_a_config_are_finite(name, value):
    config = open_like()
    with pytest.raises(ValueError, match=f"{name} must be a finite number"):
        ModelConfig(**{**config, name: value})


def open_like() -> dict[str, Any]:
    sizes = ("vocab_size", "width", "ff_width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions")
    return {"family": "llama", **dict.fromkeys(sizes, 4)}


@pytest.mark.parametrize(
    "made",
    [
        lambda: Rotary(theta=float("nan")),
        lambda: Rotary(theta=float("inf")),
        lambda: Rotary(kind="linear", factor=float("nan")),
        lambda: Rotary(kind="llama3", original_positions=8, low_freq_factor=4.0, high_freq_factor=4.0),
        lambda: Rotary(kind="yarn", original_positions=8, beta_fast=-1.0),
        lambda: Rotary(kind="yarn", original_positions=8, theta=1.0),
        lambda: Rotary(kind="longrope", original_positions=8, short_factors=(float("inf"),), long_factors=(1.0,)),
        lambda: Rotary(dims="4"),
        lambda: Alibi(max_bias=float("inf")),
        lambda: ModelConfig(**open_like(), windows=(2**40,) * 4),
        lambda: ModelConfig(**open_like(), eos_token_ids=([],)),
        lambda: ModelConfig(**open_like(), rotary={}),
        lambda: ModelConfig(**open_like(), gated=1),
        lambda: ModelConfig(**(open_like() | {"max_positions": 2**31})),
    ],
)
def test_fields_of_a_config(made):
    with pytest.raises(ValueError, match="must"):
        made()


@pytest.mark.parametrize("layers", [2**31, 2**63, 10**30, 70_000])
def test_layers_without_end(tmp_path, layers):
    for model_type in ("llama", "mistral", "qwen2", "gemma3_text", "smollm3"):
        config = checkpoints.config(model_type=model_type, num_hidden_layers=layers)
        folder = checkpoints.write(tmp_path / model_type, config=config)
        with pytest.raises(ValueError, match=r"num_hidden_layers must be|config\.json"):
            open_source(folder)
    config = checkpoints.config(num_hidden_layers=min(layers, 2**32 - 1))
    file = write_gguf(tmp_path / "x.gguf", checkpoints.tensors(), config)
    with pytest.raises(ValueError, match="block_count"):
        open_source(file)


# ---- GGUF: what llama.cpp refuses, too ----


def offset_field(raw: bytes, name: bytes, axes: int) -> int:
    """Where the header says where a tensor begins."""
    return raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 8 * axes + 4


@pytest.mark.parametrize("change", ["shifted", "overlapping", "swapped", "gap"])
def test_offsets_are_those_that_llama_cpp_demands(tmp_path, change):
    raw = write_gguf(tmp_path / "x.gguf", checkpoints.tensors()).read_bytes()
    gate, up = (offset_field(raw, b"blk.1.ffn_%s.weight" % name, 2) for name in (b"gate", b"up"))
    places = {at: struct.unpack_from("<Q", raw, at)[0] for at in (gate, up)}
    new = {
        "shifted": {gate: places[gate] + 4},
        "overlapping": {up: places[gate]},
        "swapped": {gate: places[up], up: places[gate]},
        "gap": {gate: places[gate] + 32},
    }[change]
    damaged = bytearray(raw)
    for at, place in new.items():
        struct.pack_into("<Q", damaged, at, place)
    (tmp_path / "x.gguf").write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"x\.gguf: not a readable GGUF file \(tensor blk\.1\.ffn_\w+\.weight begins at"
    ):
        open_source(tmp_path / "x.gguf")


@pytest.mark.parametrize("alignment", [0, 3, 24, 48])
def test_alignments_are_powers_of_two(tmp_path, alignment):
    extra = [lambda writer: writer.add_uint32("general.alignment", alignment)]
    file = write_gguf(tmp_path / "x.gguf", checkpoints.tensors(), extra=extra)
    with pytest.raises(ValueError, match=f"general.alignment is {alignment}, not a power of two"):
        open_source(file)
