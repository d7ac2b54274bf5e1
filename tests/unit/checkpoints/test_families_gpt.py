"""GPT-2, GPT-J, GPT-NeoX, OPT and BLOOM as their checkpoints on the hub are: old names, buffers, odd attributes."""

from __future__ import annotations

import importlib
from typing import Any, cast

import numpy as np
import pytest
from cases import Cases, build_torch
from safetensors.numpy import load_file, save_file

from griffin_jax.checkpoints.families import families, family_of
from griffin_jax.checkpoints.loading import open_source
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.model.config import Alibi, ModelConfig, Rotary

# Configurations of the hub, without what is the same everywhere: gpt2, gpt2-xl, gpt-j-6b, gpt-neox-20b, pythia-70m,
# opt-350m, opt-1.3b, galactica-125m, bloom-560m, bloom-7b1.
SUMMARY = {
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
}
GPT = {
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "resid_pdrop": 0.1,
    **SUMMARY,
}
GPT2 = {
    **GPT,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
GPTJ = {
    **GPT,
    "model_type": "gptj",
    "attn_pdrop": 0.0,
    "gradient_checkpointing": False,
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "vocab_size": 50400,
}
NEOX = {
    "model_type": "gpt_neox",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
OPT = {
    "model_type": "opt",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 8192,
    "hidden_size": 2048,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "prefix": "</s>",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 2048,
}
BLOOM = {
    "model_type": "bloom", "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True,
    "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100, "pad_token_id": 3,
    "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False,
    "slow_but_exact": False, "unk_token_id": 0, "use_cache": True, "vocab_size": 250880,
}  # fmt: skip


def read(values: dict[str, Any], **changes: Any) -> ModelConfig:
    values = values | changes
    return family_of(values["model_type"], "config.json").model_config(values, "config.json")


def test_configurations_of_gpt2():
    small, large = read(GPT2, _num_labels=1), read(GPT2, n_embd=1600, n_head=25, n_layer=48, output_past=True)
    assert (small.width, small.ff_width, small.num_heads, small.head_dim) == (768, 3072, 12, 64)
    assert small.max_positions == 1024
    assert (large.width, large.ff_width, large.num_heads, large.head_dim, large.num_layers) == (1600, 6400, 25, 64, 48)
    assert small.learned_positions
    assert small.tied_head
    named_as_elsewhere = {name: value for name, value in GPT2.items() if name not in ("n_embd", "n_head", "n_layer")}
    assert read(named_as_elsewhere, hidden_size=768, num_attention_heads=12, num_hidden_layers=12) == small
    with pytest.raises(ValueError, match="n_embd is 768, but hidden_size is 512"):
        read(GPT2, hidden_size=512)


def test_configurations_of_gptj():
    config = read(GPTJ)
    assert (config.width, config.ff_width, config.head_dim, config.max_positions) == (4096, 16384, 256, 2048)
    assert config.rotary == Rotary(dims=64, interleaved=True)
    assert config.head_bias
    assert not config.tied_head


def test_configurations_of_gpt_neox():
    pythia = read(NEOX)
    large = read(
        NEOX, hidden_size=6144, intermediate_size=24576, num_attention_heads=64, num_hidden_layers=44,
        hidden_act="gelu_fast", attention_probs_dropout_prob=0, hidden_dropout_prob=0,
    )  # fmt: skip
    assert (pythia.rotary, pythia.activation, pythia.parallel) == (Rotary(dims=16), "gelu", True)
    assert (large.rotary, large.activation, large.eos_token_ids) == (Rotary(dims=24), "gelu_tanh", (0,))
    assert read(NEOX, rotary_pct=1.0, rotary_emb_base=500).rotary == Rotary(theta=500.0)
    with pytest.raises(ValueError, match=r"rotary_pct is 0\.25, but partial_rotary_factor is 0\.5"):
        read(NEOX, partial_rotary_factor=0.5)


def test_configurations_of_opt():
    usual = read(OPT)
    behind = read(OPT, do_layer_norm_before=False, word_embed_proj_dim=512, hidden_size=1024, num_attention_heads=16)
    galactica = read(OPT, learned_embeddings=True, scale_embeddings=False, activation_function="gelu")
    assert (usual.norm_placement, usual.final_norm, usual.embedding_width) == ("pre", True, None)
    assert usual.activation == "relu"
    assert (behind.norm_placement, behind.final_norm, behind.embedding_width) == ("post", False, 512)
    assert galactica.activation == "gelu"
    assert not read(OPT, _remove_final_layer_norm=True).final_norm


def test_configurations_of_bloom():
    small, large = read(BLOOM), read(BLOOM, n_embed=4096, n_layer=30, num_attention_heads=32, pretraining_tp=4)
    assert (small.width, small.ff_width, small.head_dim, small.num_layers) == (1024, 4096, 64, 24)
    assert (small.alibi, small.embedding_norm, small.max_positions) == (Alibi(), True, 2048)
    assert (large.width, large.num_layers, large.head_dim) == (4096, 30, 128)
    assert read(BLOOM, seq_length=4096).max_positions == 4096
    assert read(BLOOM, slow_but_exact=True) == small


def test_the_context_of_bloom_in_gguf_files():
    """llama.cpp writes the width where config.json has no seq_length; then it is the default as there."""
    gguf = families()["bloom"].gguf
    assert gguf is not None
    sizes = {"embedding_length": 32, "feed_forward_length": 128, "block_count": 3, "attention.head_count": 4}
    eps = {"attention.layer_norm_epsilon": 1e-5}
    for written, expected in ((32, 2048), (4096, 4096)):
        metadata = Attributes({**sizes, **eps, "context_length": written}, "metadata")
        values = gguf.read_config(metadata, cast(Any, None))
        assert read(values, model_type="bloom", vocab_size=101).max_positions == expected


@pytest.mark.parametrize(
    ("values", "changes", "named"),
    [
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GPTJ, {"rotary": False}, "rotary"),
        (GPTJ, {"rotary_dim": None}, "rotary_dim"),
        (OPT, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        (BLOOM, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        (BLOOM, {"n_inner": 100}, "n_inner"),
        (BLOOM, {"slow_but_exact": True, "pretraining_tp": 4}, "slow_but_exact"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_what_would_be_computed_differently_is_refused(values, changes, named):
    with pytest.raises(ValueError, match=f"{named}\\b"):
        read(values, **changes)


# ---- tensors ----


def cases_of(family: str) -> Cases:
    return importlib.import_module(f"cases.{family}").CASES


def same(first: Any, second: Any) -> bool:
    dtype = np.dtype(np.float32)
    return first.shapes == second.shapes and all(
        np.array_equal(first.read(path, dtype), second.read(path, dtype)) for path in first.shapes
    )


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt"])
@pytest.mark.parametrize("with_head", [False, True], ids=["without head", "with a copy as head"])
def test_checkpoints_of_the_bare_model(family, with_head, tmp_path):
    """As gpt2, bloom-560m and opt-350m are on the hub."""
    build_torch(family, cases_of(family).config, tmp_path)
    expected = open_source(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = {name: weights[of].copy() for name, of in families()[family].copies.items() if with_head}
    weights = {name.removeprefix(families()[family].prefix): array for name, array in weights.items()} | head
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    save_file(weights, tmp_path / "bare" / "model.safetensors")
    assert same(open_source(tmp_path / "bare"), expected)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gpt_neox", "mpt", "llama"])
def test_a_tied_embedding_is_read_from_the_head_as_transformers_does(family, tmp_path):
    from transformers import AutoModelForCausalLM

    build_torch(family, {**cases_of(family).config, "tie_word_embeddings": True}, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name, of in families()[family].copies.items():
        weights[name] = weights.pop(of)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    source = open_source(other)
    assert same(source, open_source(tmp_path))
    embedding = AutoModelForCausalLM.from_pretrained(other).get_input_embeddings().weight.numpy()
    np.testing.assert_array_equal(source.read("embedding", np.dtype(np.float32)), embedding)


BUFFERS = {
    "gpt2": ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
    "gptj": ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
    "gpt_neox": (
        "gpt_neox.layers.{}.attention.bias", "gpt_neox.layers.{}.attention.masked_bias",
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", BUFFERS)
def test_masks_and_wavelengths_in_old_files_are_ignored(family, tmp_path):
    """Also where they are more values than the weights: the stored dtype is that of the weights."""
    build_torch(family, cases_of(family).config, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: array.astype(np.float16) for name, array in load_file(file).items()}
    save_file(weights, file)
    expected = open_source(tmp_path)
    masks = {name.format(layer): np.ones((1, 1, 256, 256), bool) for name in BUFFERS[family] for layer in range(3)}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    save_file(weights | masks, tmp_path / "old" / "model.safetensors")
    source = open_source(tmp_path / "old")
    assert source.dtype == np.float16
    assert same(source, expected)
