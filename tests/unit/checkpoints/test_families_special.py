"""What is special about single families: LongRoPE's two sets of factors, published configurations, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import LLAMA_LIKE, VOCABULARY, all_cases, build_torch
from cases.mpt import CASES as MPT
from cases.phi3 import longrope
from reference import assert_close, stepwise_logits, torch_logits
from transformers import AutoConfig

import griffin_jax as gj
from griffin_jax.checkpoints.families import families, family_of
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.generation import jitted
from griffin_jax.model.config import ModelConfig


def read(values: dict[str, Any]) -> ModelConfig:
    return family_of(values["model_type"], "config.json").model_config(values, "config.json")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A file's tensors, all ones."""

    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        return np.ones(self.shapes[name], np.float32)


def read_gguf(model_type: str, metadata: dict[str, Any], *tensors: str) -> dict[str, Any]:
    gguf = families()[model_type].gguf
    assert gguf is not None
    return gguf.read_config(Attributes(metadata, "model.gguf"), Stored(dict.fromkeys(tensors, (1,))))


# ---- kinds of layers ----


@pytest.mark.parametrize("family", all_cases())
def test_kinds_of_layers_that_a_file_does_not_list_are_those_of_transformers(family, tmp_path):
    """Newer configurations list which layers have a window; older ones say it by other attributes or not at all."""
    cases = all_cases()[family]
    for number, attributes in enumerate(cases.variants.values()):
        values = {**cases.config, **attributes}
        theirs = AutoConfig.for_model(family, **values)
        theirs.save_pretrained(tmp_path / str(number))
        listed = json.loads((tmp_path / str(number) / "config.json").read_text())
        if "layer_types" in values or "layer_types" not in listed:
            continue
        without = {name: value for name, value in listed.items() if name != "layer_types"}
        assert read(without) == read(listed)


# ---- LongRoPE ----


@pytest.fixture(scope="module")
def longropes(tmp_path_factory) -> dict[str, gj.LLM]:
    """The same weights with 32 positions before LongRoPE's long factors apply, with almost none, and with all."""
    models = {}
    for name, original in (("both", 32), ("long", 2), ("short", 256)):
        folder = tmp_path_factory.mktemp(name)
        parameters = {"rope_parameters": longrope(4, attention_factor=1.2)}
        build_torch("phi3", {**LLAMA_LIKE, **parameters, "original_max_position_embeddings": original}, folder)
        models[name] = gj.load(folder, "float32")
    return models


def answer(llm: gj.LLM, *prompts: list[int]) -> list[list[int]]:
    return llm.generate(prompts, max_new_tokens=12, density=1.0, ignore_eos=True).tokens


@pytest.mark.thorough
def test_experts_of_longrope_go_by_prompt_and_answer_together(longropes, rng):
    """As the answer's own; a prompt of 25 tokens is below the limit, and above it with an answer of 12."""
    llm, prompt = longropes["both"], rng.integers(3, VOCABULARY, 25).tolist()
    kept = llm.generate([prompt], max_new_tokens=12, density=0.5).experts
    found, short = (llm.experts([prompt], max_new_tokens=new, density=0.5) for new in (12, 1))
    assert kept is not None
    assert all((own == other).all() for own, other in zip(found, kept, strict=True))
    assert any((own != other).any() for own, other in zip(found, short, strict=True))


@pytest.mark.thorough
def test_longrope_goes_by_prompt_and_answer_together(longropes, rng):
    below, above = (rng.integers(3, VOCABULARY, n).tolist() for n in (20, 21))
    for prompt in (below, above):
        assert answer(longropes["long"], prompt) != answer(longropes["short"], prompt)
    assert answer(longropes["both"], below) == answer(longropes["short"], below)
    # From its first token on, though only the last one lies beyond the original context.
    assert answer(longropes["both"], above) == answer(longropes["long"], above)


@pytest.mark.thorough
def test_longrope_goes_by_each_text_of_a_batch(longropes, rng):
    above, below = (rng.integers(3, VOCABULARY, n).tolist() for n in (25, 5))
    expected = answer(longropes["long"], above) + answer(longropes["short"], below)
    assert answer(longropes["both"], above, below) == expected


PHI3 = {
    **LLAMA_LIKE, "model_type": "phi3", "rms_norm_eps": 1e-5, "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_early_names_of_longrope(kind):
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1, 2, 3, 4]}
    rotary = read({**PHI3, "rope_scaling": {"type": kind, **factors}}).rotary
    assert rotary is not None
    assert (rotary.kind, rotary.original_positions) == ("longrope", 16)
    assert rotary.attention_factor == math.sqrt(1 + math.log(256 / 16) / math.log(16))


@pytest.mark.parametrize("more", [{}, {"factor": 3.0}, {"attention_factor": 1.3}])
def test_attention_factor_of_longrope(more, tmp_path):
    attributes = {"rope_parameters": longrope(4, **more), "original_max_position_embeddings": 16}
    model = build_torch("phi3", {**LLAMA_LIKE, **attributes}, tmp_path)
    rotary = read(json.loads((tmp_path / "config.json").read_text())).rotary
    assert rotary is not None
    assert rotary.attention_factor == model.model.rotary_emb.attention_scaling


PHIMOE = {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}


def phimoe_rope(short: float, long: float) -> dict[str, Any]:
    return {"rope_parameters": longrope(4, original_max_position_embeddings=16, short_mscale=short, long_mscale=long)}


def test_attention_factor_of_phimoe_is_given():
    rotary = read({**PHIMOE, "model_type": "phimoe", **phimoe_rope(1.3, 1.3)}).rotary
    assert rotary is not None
    assert (rotary.kind, rotary.attention_factor, rotary.original_positions) == ("longrope", 1.3, 16)
    with pytest.raises(ValueError, match=r"short_mscale is 1\.3 and long_mscale 1\.2; only equal ones are supported"):
        read({**PHIMOE, "model_type": "phimoe", **phimoe_rope(1.3, 1.2)})


@pytest.mark.slow
def test_long_texts_of_phimoe_have_the_long_factors(tmp_path, rng, monkeypatch):
    """As in the code that it was published with; transformers 5 takes the short ones, and is helped here."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = build_torch("phimoe", {**PHIMOE, **phimoe_rope(1.3, 1.3)}, tmp_path)
    tokens = rng.integers(3, VOCABULARY, (1, 40)).astype(np.int32)
    ours = stepwise_logits(gj.load(tmp_path, "float32").model, [tokens], 40)
    monkeypatch.setattr(
        model.model.rotary_emb, "rope_init_fn", lambda config: ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=17)
    )
    assert_close(ours, torch_logits(model, tokens))


# ---- Published configurations ----

AUTO_MAP = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Phi-3-mini-4k": {
        "model_type": "phi3", "auto_map": AUTO_MAP, "attention_dropout": 0.0, "bos_token_id": 1, "embd_pdrop": 0.0,
        "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
        "sliding_window": 2047, "tie_word_embeddings": False, "attention_bias": False, "vocab_size": 32064,
    },
    "Phi-4-mini": {
        "model_type": "phi3", "auto_map": AUTO_MAP, "attention_bias": False, "bos_token_id": 199999,
        "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        "vocab_size": 200064,
    },
    "Falcon-7B": {
        "model_type": "falcon", "alibi": False, "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0, "auto_map": AUTO_MAP, "bias": False, "bos_token_id": 11, "eos_token_id": 11,
        "hidden_dropout": 0.0, "hidden_size": 4544, "layer_norm_epsilon": 1e-05, "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32, "parallel_attn": True,
        "vocab_size": 65024,
    },
    "Falcon-40B": {
        "model_type": "falcon", "alibi": False, "apply_residual_connection_post_layernorm": False, "bias": False,
        "hidden_size": 8192, "new_decoder_architecture": True, "num_attention_heads": 128, "num_hidden_layers": 60,
        "num_kv_heads": 8, "parallel_attn": True, "vocab_size": 65024,
    },
    "Falcon2-11B": {
        "model_type": "falcon", "activation": "gelu", "alibi": False, "bias": False, "ffn_hidden_size": 16384,
        "hidden_size": 4096, "max_position_embeddings": 8192, "multi_query": True, "new_decoder_architecture": True,
        "num_attention_heads": 32, "num_hidden_layers": 60, "num_kv_heads": 8, "num_ln_in_parallel_attn": 1,
        "parallel_attn": True, "rope_scaling": None, "rope_theta": 500042.0, "tie_word_embeddings": False,
        "vocab_size": 65024,
    },
    "Falcon-RW-1B": {
        "model_type": "falcon", "alibi": True, "apply_residual_connection_post_layernorm": False, "bias": True,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048, "multi_query": False,
        "new_decoder_architecture": False, "num_attention_heads": 32, "num_hidden_layers": 24, "parallel_attn": False,
        "vocab_size": 50304,
    },
    "MPT-7B-StoryWriter": {
        "model_type": "mpt", "auto_map": AUTO_MAP, "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0,
        "attn_config": {
            "alibi": True, "alibi_bias_max": 16, "attn_impl": "torch", "attn_pdrop": 0,
            "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": 6, "prefix_lm": False,
            "qk_ln": False, "softmax_scale": None,
        },
        "expansion_ratio": 4, "init_config": {"name": "kaiming_normal_", "verbose": 0}, "init_device": "cpu",
        "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 65536, "n_heads": 32, "n_layers": 32,
        "no_bias": True, "norm_type": "low_precision_layernorm", "resid_pdrop": 0,
        "tokenizer_name": "EleutherAI/gpt-neox-20b", "use_cache": False, "verbose": 0, "vocab_size": 50432,
    },
    "StableLM-2-12B": {
        "model_type": "stablelm", "bos_token_id": 100257, "eos_token_id": 100257, "hidden_act": "silu",
        "hidden_size": 5120, "intermediate_size": 13824, "layer_norm_eps": 1e-05, "max_position_embeddings": 4096,
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "partial_rotary_factor": 0.25,
        "qk_layernorm": True, "rope_theta": 10000, "tie_word_embeddings": False, "use_parallel_residual": True,
        "use_qkv_bias": False, "vocab_size": 100352,
    },
}  # fmt: skip
"""Attributes as the hub has them, but for those that every family ignores."""

EXPECTED: dict[str, dict[str, Any]] = {
    "Phi-3-mini-4k": {"head_dim": 96, "windows": (2047,) * 32},
    "Phi-4-mini": {"head_dim": 128, "tied_head": True},
    "Falcon-7B": {"num_kv_heads": 1, "ff_width": 18176, "shared_norm": True, "tied_head": True},
    "Falcon-40B": {"num_kv_heads": 8, "parallel": True, "shared_norm": False},
    "Falcon2-11B": {"num_kv_heads": 8, "shared_norm": True, "max_positions": 8192},
    "Falcon-RW-1B": {"num_kv_heads": 32, "parallel": False, "rotary": None, "attention_bias": True},
    "MPT-7B-StoryWriter": {"qkv_clip": 6.0, "max_positions": 65536, "ff_width": 16384, "rotary": None},
    "StableLM-2-12B": {"head_norm": "own", "shared_norm": True, "head_dim": 160},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    config = read(PUBLISHED[name])
    assert {field: getattr(config, field) for field in EXPECTED[name]} == EXPECTED[name]


REFUSED = [
    ("Phi-4-mini", {"attention_bias": True}, "attention_bias"),
    ("Phi-4-mini", {"interpolate_factor": 2}, "interpolate_factor"),
    ("Phi-4-mini", {"sliding_window": 0}, "sliding_window"),
    ("Phi-3-mini-4k", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "kind 'linear'"),
    ("Falcon-7B", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
    ("Falcon-7B", {"num_ln_in_parallel_attn": 2}, "do not go together"),
    ("Falcon-7B", {"partial_rotary_factor": 0.5}, "whole heads"),
    ("Falcon-40B", {"parallel_attn": False}, "do not go together"),
    ("Falcon-RW-1B", {"num_kv_heads": 8}, "num_kv_heads is 8"),
    ("MPT-7B-StoryWriter", {"no_bias": False}, "no_bias"),
    ("MPT-7B-StoryWriter", {"expansion_ratio": 2}, "expansion_ratio"),
    ("MPT-7B-StoryWriter", {"norm_type": "rmsnorm"}, "norm_type"),
    ("MPT-7B-StoryWriter", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
    ("MPT-7B-StoryWriter", {"attn_config": {"alibi": False}}, "alibi"),
    ("MPT-7B-StoryWriter", {"attn_config": {"qk_ln": True}}, "qk_ln"),
    ("MPT-7B-StoryWriter", {"attn_config": {"prefix_lm": True}}, "prefix_lm"),
    ("MPT-7B-StoryWriter", {"attn_config": {"attn_uses_sequence_id": True}}, "attn_uses_sequence_id"),
    ("MPT-7B-StoryWriter", {"attn_config": {"attn_type": "grouped_query_attention"}}, "attn_type"),
    ("StableLM-2-12B", {"rotary_scaling_factor": 2.0}, "rotary_scaling_factor"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_cannot_be_computed_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        read({**PUBLISHED[name], **changes})


def test_largest_alibi_bias_of_mpt(tmp_path: Path, rng):
    """transformers has an argument for it and does not pass it."""
    attributes = {**MPT.config, "attn_config": {"alibi_bias_max": 16}}
    model = build_torch("mpt", attributes, tmp_path)
    build = model.transformer.build_mpt_alibi_tensor
    model.transformer.build_mpt_alibi_tensor = lambda heads, length, device: build(heads, length, 16, device)
    row = rng.integers(3, VOCABULARY, 20).astype(np.int32)
    tokens, lengths = (jnp.asarray(array) for array in gj.pad([row], 20))
    got = jitted.prefill(gj.load(tmp_path, "float32").model, tokens, lengths, max_new_tokens=4, collect=False)
    expected = torch_logits(model, [row])[0, -1]
    np.testing.assert_allclose(np.asarray(got.logits[0]), expected, atol=1e-5 * np.abs(expected).max())


# ---- GGUF files that do not say what matters ----

SIZES = {
    "embedding_length": 32, "block_count": 3, "attention.head_count": 4, "attention.head_count_kv": 2,
    "attention.layer_norm_epsilon": 1e-5,
}  # fmt: skip


def test_gguf_files_without_the_rotary_base_of_falcon2_are_refused():
    sizes = {**SIZES, "feed_forward_length": 128, "context_length": 2048}
    with pytest.raises(ValueError, match="Falcon2"):
        read_gguf("falcon", sizes, "blk.0.attn_norm.weight")
    assert read_gguf("falcon", {**sizes, "rope.freq_base": 5e5}, "blk.0.attn_norm.weight")["rope_theta"] == 5e5
    values = read_gguf("falcon", sizes, "blk.0.attn_norm.weight", "blk.0.attn_norm_2.weight")
    assert (values["num_ln_in_parallel_attn"], values["rope_theta"]) == (2, 1e4)


def test_gguf_files_without_the_rotary_base_of_stable_code_are_refused():
    sizes = {**SIZES, "feed_forward_length": 48, "rope.dimension_count": 2}
    with pytest.raises(ValueError, match="Stable Code"):
        read_gguf("stablelm", {**sizes, "context_length": 16384})
    assert read_gguf("stablelm", {**sizes, "context_length": 4096})["rope_theta"] == 1e4


def test_gguf_files_of_mpt_without_alibi_are_refused():
    sizes = {**SIZES, "attention.head_count_kv": 4, "feed_forward_length": 128, "context_length": 64}
    values = read_gguf("mpt", sizes, "position_embd.weight")
    with pytest.raises(ValueError, match="alibi"):
        read({"model_type": "mpt", "vocab_size": VOCABULARY, **values})
    with pytest.raises(ValueError, match="sizes of an MPT model"):
        read_gguf("mpt", {**sizes, "feed_forward_length": 64})


def test_gguf_files_with_one_of_the_factors_of_longrope_are_refused():
    sizes = {**SIZES, "feed_forward_length": 48, "context_length": 64, "attention.layer_norm_rms_epsilon": 1e-5}
    with pytest.raises(ValueError, match=r"LongRoPE without rope_factors_short\.weight"):
        read_gguf("phi3", sizes, "rope_factors_long.weight")
