"""Checkpoints whose tensors have other names: text models of models that read images, too, and EXAONE 3."""

from __future__ import annotations

import re

import checkpoints
import numpy as np
import pytest

from griffin_jax.checkpoints.loading import load_model, open_source

LAYOUTS = {
    "before transformers 4.52": ("language_model.model.", "language_model.lm_head."),
    "since then": ("model.language_model.", "lm_head."),
    "model in model": ("model.language_model.model.", "model.language_model.lm_head."),
    "without its head": ("language_model.", "lm_head."),
}
"""Where the text model's tensors and its head's are."""


def write_whole(folder, layout, *, tied=False, drop=(), **outer):
    model, head = LAYOUTS[layout]
    weights = {
        re.sub("^lm_head\\.", head, re.sub("^model\\.", model, name)): array
        for name, array in checkpoints.tensors(tied=tied).items()
        if name not in drop
    }
    for place in ("vision_tower.patch_conv.weight", "model.multi_modal_projector.norm.weight"):
        weights[place] = np.ones((3, 2), np.float32)
    text = checkpoints.config(model_type="mistral", sliding_window=8, tie_word_embeddings=None)
    outer = {"model_type": "mistral3", "text_config": text, "vision_config": {"hidden_size": 3}, **outer}
    return checkpoints.write(folder, weights, config=outer)


def plain(folder, *, tied=False):
    config = checkpoints.config(model_type="mistral", sliding_window=8, tie_word_embeddings=tied)
    return checkpoints.write(folder, checkpoints.tensors(tied=tied), config=config)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_text_model_is_read_from_wherever_it_lies(tmp_path, layout, tied):
    """And where the configuration does not say whether the head is tied, the tensors do."""
    with pytest.warns(UserWarning, match="of this mistral3 only the text model is read, without images"):
        whole, _ = load_model(write_whole(tmp_path / "whole", layout, tied=tied), "float32")
    alone, _ = load_model(plain(tmp_path / "alone", tied=tied), "float32")
    assert whole.config.tied_head == tied
    expected = checkpoints.logits(alone, [3, 4, 5])
    np.testing.assert_array_equal(checkpoints.logits(whole, [3, 4, 5]), expected)


@pytest.mark.filterwarnings("ignore:.*only the text model is read:UserWarning")
def test_a_head_without_an_embedding_is_tied(tmp_path):
    """By default it is, for transformers."""
    drop = ("model.embed_tokens.weight",)
    whole, _ = load_model(write_whole(tmp_path / "whole", "since then", drop=drop), "float32")
    assert whole.config.tied_head
    np.testing.assert_array_equal(whole.embedding, checkpoints.tensors()["lm_head.weight"])


@pytest.mark.filterwarnings("ignore:.*only the text model is read:UserWarning")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "qwen2"}}, r"text_config: model_type is 'qwen2'; supported are mistral, mini"),
        ({"text_config": None}, "missing text_config"),
        ({"tie_word_embeddings": False, "drop": ("lm_head.weight",)}, r"1 missing: lm_head\.weight"),
        ({"drop": ("model.norm.weight",)}, r"1 missing: model\.norm\.weight"),
    ],
)
def test_what_is_wrong_with_the_text_model_is_said(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_source(write_whole(tmp_path / "whole", "since then", **changes))


def test_the_end_of_an_answer_is_that_of_the_whole(tmp_path):
    folder = write_whole(tmp_path / "whole", "since then", eos_token_id=[5, 7])
    with pytest.warns(UserWarning, match="without images"):
        assert open_source(folder).config.eos_token_ids == (5, 7)


EXAONE = {
    "model.embed_tokens.": "transformer.wte.", "model.norm.": "transformer.ln_f.", "model.layers.": "transformer.h.",
    "self_attn.o_proj": "attn.attention.out_proj", "self_attn.": "attn.attention.", "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2", "mlp.gate_proj": "mlp.c_fc_0", "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
}  # fmt: skip
"""Names that EXAONE 3 was published with, by Llama's."""


def test_exaone_is_llama_with_other_names(tmp_path):
    named = {}
    for name, array in checkpoints.tensors().items():
        for llama, exaone in EXAONE.items():
            name = name.replace(llama, exaone)
        named[name] = array
    other = {
        "num_layers": 2, "num_hidden_layers": None, "layer_norm_epsilon": 1e-5, "rms_norm_eps": None,
        "activation_function": "silu", "hidden_act": None, "rope_theta": 10_000.0,
    }  # fmt: skip
    config = checkpoints.config(model_type="exaone", **other)
    exaone, _ = load_model(checkpoints.write(tmp_path / "exaone", named, config=config), "float32")
    llama, _ = load_model(checkpoints.write(tmp_path / "llama"), "float32")
    expected = checkpoints.logits(llama, [3, 4, 5])
    np.testing.assert_array_equal(checkpoints.logits(exaone, [3, 4, 5]), expected)


def test_constants_that_are_stored_are_compared(tmp_path):
    """Apertus stores two numbers of its activation that were not trained."""
    weights = checkpoints.tensors()
    for layer in range(checkpoints.LAYERS):
        prefix = f"model.layers.{layer}."
        del weights[prefix + "mlp.gate_proj.weight"]
        weights[prefix + "attention_layernorm.weight"] = weights.pop(prefix + "input_layernorm.weight")
        weights[prefix + "feedforward_layernorm.weight"] = weights.pop(prefix + "post_attention_layernorm.weight")
        for name in ("q_norm", "k_norm"):
            weights[f"{prefix}self_attn.{name}.weight"] = np.ones(checkpoints.HEAD_DIM, np.float32)
        for name, value in (("alpha_p", [0.3]), ("alpha_n", [0.4]), ("beta", 0.5), ("eps", -1e-6)):
            weights[f"{prefix}mlp.act_fn.{name}"] = np.asarray(value, np.float32)
    config = checkpoints.config(model_type="apertus", hidden_act="xielu")
    assert open_source(checkpoints.write(tmp_path / "right", weights, config=config)).config.activation == "xielu"
    weights["model.layers.1.mlp.act_fn.beta"] = np.asarray(0.25, np.float32)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.act_fn\.beta is 0\.25, and only 0\.5 is supported"):
        open_source(checkpoints.write(tmp_path / "wrong", weights, config=config))
