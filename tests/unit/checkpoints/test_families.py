"""From config.json to ModelConfig, the guard around it, and the parity of weights."""

from __future__ import annotations

import math
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from conftest import first_and_slow

from griffin_jax.checkpoints import families as families_module
from griffin_jax.checkpoints.families import REFUSED, Layout, families, family_of, gguf_family_of, table
from griffin_jax.checkpoints.loading import load_model
from griffin_jax.checkpoints.schema.relevance import causal_models
from griffin_jax.model.config import Rotary
from griffin_jax.model.positions import rotary_frequencies
from griffin_jax.utils.messages import CheckpointWarning


def read(**changes):
    return family_of("llama", "config.json").model_config(checkpoints.config(**changes), "config.json")


def test_every_field_of_a_llama_config():
    config = read(
        hidden_act="relu", tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_theta=500000.0,
        eos_token_id=[2, 3],
    )  # fmt: skip
    assert (config.family, config.vocab_size, config.width, config.ff_width) == ("llama", 32, 16, 24)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 6)
    assert (config.max_positions, config.activation, config.gated, config.norm_eps) == (64, "relu", True, 1e-5)
    assert config.rotary == Rotary(theta=500000.0)
    assert config.tied_head
    assert config.attention_bias
    assert config.attention_out_bias
    assert config.ff_bias
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 3))


def test_defaults_of_what_may_be_left_out():
    config = read(
        head_dim=None, num_key_value_heads=None, hidden_act=None, tie_word_embeddings=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    assert (config.head_dim, config.num_kv_heads, config.activation, config.tied_head) == (4, 4, "silu", False)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))


def test_null_tokens_are_none():
    values = checkpoints.config() | {"bos_token_id": None, "eos_token_id": None}
    config = family_of("llama", "config.json").model_config(values, "config.json")
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


# ---- rotary embedding ----

SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16, "beta_slow": 2,
     "truncate": False, "attention_factor": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
def test_rotary_scaling_is_that_of_transformers(scaling):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = checkpoints.config(head_dim=32, rope_theta=5000.0, rope_scaling=scaling)
    rotary = read(head_dim=32, rope_theta=5000.0, rope_scaling=scaling).rotary
    reference = LlamaRotaryEmbedding(LlamaConfig(**values))
    np.testing.assert_allclose(rotary_frequencies(rotary, 32), reference.inv_freq.numpy(), rtol=1e-6)
    assert math.isclose(rotary.attention_factor, reference.attention_scaling)


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, *SCALINGS], ids=lambda scaling: scaling["rope_type"])
def test_both_spellings_of_rotary_parameters_agree(scaling):
    old = read(rope_theta=5000.0, rope_scaling=scaling)
    assert read(rope_parameters={"rope_theta": 5000.0, **scaling}) == old
    renamed = {"type" if name == "rope_type" else name: value for name, value in scaling.items()}
    assert read(rope_theta=5000.0, rope_scaling=renamed) == old


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "mrope"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "missing short_factor, long_factor"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "must be 3, one for each pair, got 1",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "missing factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 3.0}}, "mscale=3.0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "missing low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "turns whole heads only"),
        ({"rope_scaling": "linear"}, "rope_scaling must be dict"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1.0}},
            "contradict",
        ),
        ({"rope_theta": 0}, "theta"),
    ],
)
def test_rotary_parameters_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        (
            {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            256,
        ),
        # Beyond the context it changes with the length of the text.
        ({"rope_type": "dynamic", "factor": 4.0}, 64),
    ],
)  # fmt: skip
def test_scaling_extends_the_context(scaling, positions):
    assert read(rope_scaling=scaling).max_positions == positions


# ---- the guard ----


def test_unknown_attributes_are_listed_together():
    with pytest.raises(ValueError, match=r"config\.json: .*layer_types=\['x'\], sliding_window=512") as error:
        read(sliding_window=512, layer_types=["x"], use_cache=True, never_heard_of=1)
    assert "use_cache" not in str(error.value)
    assert "never_heard_of" not in str(error.value)


def test_attributes_that_no_code_reads_are_warned_of():
    with pytest.warns(UserWarning, match=r"^config\.json: never_heard_of=1, rope_interleaved=True changes nothing"):
        assert read(never_heard_of=1, rope_interleaved=True) == read()
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    with pytest.warns(UserWarning, match="rotary embedding of kind 'yarn': finetuned=True changes nothing"):
        assert read(rope_scaling={**scaling, "finetuned": True}) == read(rope_scaling=scaling)


def test_where_the_code_is_not_known_every_attribute_counts(monkeypatch):
    from griffin_jax.checkpoints.schema import attributes

    monkeypatch.setattr(attributes, "read_by_transformers", lambda model_type: None)
    with pytest.raises(ValueError, match="never_heard_of=1"):
        read(never_heard_of=1)


@pytest.mark.parametrize("name", ["scores_scale", "position_shift"])
def test_attributes_that_transformers_reads_are_found(monkeypatch, tmp_path, name):
    """In a model's own module, its configuration or a shared module: as an attribute, a string or an argument."""
    from griffin_jax.checkpoints.schema import relevance

    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "modeling_rope_utils.py").write_text("def f(config):\n    return config.position_shift\n")
    (tmp_path / "models/llama/modeling_llama.py").write_text("class A:\n    s = getattr(c, 'scores_scale', 1)\n")
    (tmp_path / "models/llama/convert_llama.py").write_text("config.never_heard_of\n")
    monkeypatch.setattr(relevance, "_source_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=f"{name}=1\\. These may change"):
        read(**{name: 1})
    with pytest.warns(UserWarning, match="never_heard_of=1 changes nothing"):
        read(never_heard_of=1)


def test_attributes_without_influence_are_accepted():
    plain = read()
    assert plain == read(
        torch_dtype="float16", dtype="bfloat16", use_cache=False, transformers_version="4.40.1",
        architectures=["LlamaForCausalLM"], initializer_range=0.04, attention_dropout=0.1, pretraining_tp=2,
        pad_token_id=0, _name_or_path="x", is_llama_config=True, temperature=0.6,
        output_hidden_states=True, pruned_heads={}, is_encoder_decoder=False,
    )  # fmt: skip


def test_attributes_that_are_harmless_at_one_value_only():
    with pytest.raises(ValueError, match="pruned_heads"):
        read(pruned_heads={"0": [1]})


def test_the_default_of_transformers_is_accepted(monkeypatch):
    from griffin_jax.checkpoints.schema import attributes

    monkeypatch.setattr(attributes, "_transformers_defaults", lambda model_type: {"novelty": 3})
    monkeypatch.setattr(attributes, "read_by_transformers", lambda model_type: frozenset({"novelty"}))
    assert read(novelty=3) == read()
    with pytest.raises(ValueError, match="novelty=4"):
        read(novelty=4)


def test_defaults_come_from_the_class_of_the_model_type():
    from griffin_jax.checkpoints.schema.attributes import _transformers_defaults

    assert _transformers_defaults("llama")["mlp_bias"] is False
    assert _transformers_defaults("no such type") == {}


def test_other_quantised_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"quantization_config is .*aqlm.* of llama only gptq, awq, .* can be read"):
        read(quantization_config={"quant_method": "aqlm"})
    with pytest.raises(ValueError, match=r"quantization_config is 'awq'"):
        read(quantization_config="awq")


def test_missing_attributes_are_listed_together():
    with pytest.raises(ValueError, match=r"config\.json: missing hidden_size, rms_norm_eps"):
        read(hidden_size=None, rms_norm_eps=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "16"}, "hidden_size must be int, got '16'"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be int"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be int"),
        ({"num_hidden_layers": 0}, r"config\.json: num_hidden_layers must be a whole number from 1 to 65536"),
        ({"num_attention_heads": 5, "head_dim": None}, "hidden_size 16 is not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads 3"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh'; supported are silu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be bool"),
        ({"eos_token_id": ["x"]}, "eos_token_id must be whole numbers"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite in float32"),
    ],
)
def test_attributes_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


@pytest.mark.parametrize("eos", [32, [3, 32], -1, 52_000])
def test_special_tokens_outside_the_vocabulary_never_fire(eos):
    with pytest.warns(
        CheckpointWarning, match=r"eos_token_id -?\d+ is outside the vocabulary of 32, so no answer ends"
    ):
        config = read(eos_token_id=eos)
    assert config.eos_token_ids == ((3,) if isinstance(eos, list) else ())
    with pytest.warns(CheckpointWarning, match="bos_token_id 32 is outside the vocabulary of 32, so no text begins"):
        assert read(bos_token_id=32).bos_token_id is None


def test_unknown_families_name_the_known_ones():
    with pytest.raises(ValueError, match=r"x: model_type 'novelty' is not supported; supported are .*llama"):
        family_of("novelty", "x")
    with pytest.raises(ValueError, match="model_type None"):
        family_of(None, "x")
    assert "llama" in families()


def test_mixtures_and_others_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"x: model_type 'llama4' is not supported: its experts, router or attention"):
        family_of("llama4", "x")
    with pytest.raises(ValueError, match=r"GGUF architecture 'deepseek2' is not supported: its keys and values come"):
        gguf_family_of("deepseek2", "x")
    with pytest.raises(ValueError, match="reads or writes more than text"):
        family_of("gemma3n", "x")
    refused = [name for names in REFUSED.values() for name in names]
    assert len(refused) == len(set(refused))
    assert not set(refused) & families().keys()


def test_every_causal_model_of_transformers_is_run_or_refused_with_a_reason(monkeypatch):
    """What is in neither list is refused as new, and shows in the table."""
    kinds = causal_models()
    assert len(kinds) > 150
    assert families_module.not_looked_at() == []
    monkeypatch.setattr(families_module, "causal_models", lambda: {**kinds, "novelty": "NoveltyForCausalLM"})
    assert "was not looked at yet: `novelty`" in table()
    with pytest.raises(ValueError, match="x: model_type 'novelty' is not supported: transformers has it, and it was"):
        family_of("novelty", "x")
    assert family_of("gpt-sw3", "x") is families()["gpt2"]


def test_the_table_in_the_docs_is_that_of_the_code():
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    between = page.split("<!-- families: the output of `griffin-jax families` -->")[1].split("<!-- /families -->")[0]
    assert between.strip() == table()


# ---- layouts ----


def test_layouts_move_axes():
    sizes = {"D": 5, "N": 2, "H": 4, "P": 2}
    array = np.arange(40).reshape(5, 8)
    out = Layout.parse("D (N H) -> N H D")
    assert (out.shape_before(sizes), out.shape_after(sizes)) == ((5, 8), (2, 4, 5))
    np.testing.assert_array_equal(out.apply(array, sizes), array.T.reshape(2, 4, 5))
    assert np.shares_memory(out.apply(array, sizes), array)
    rows = np.arange(8)
    pairs = Layout.parse("(N P 2) -> (N 2 P)")
    np.testing.assert_array_equal(pairs.apply(rows, sizes), [0, 2, 1, 3, 4, 6, 5, 7])
    np.testing.assert_array_equal(Layout.parse("D").apply(np.arange(5), sizes), np.arange(5))


def test_layouts_take_parts_of_fused_tensors():
    sizes = {"D": 5, "N": 4, "G": 2, "R": 2, "H": 3, "C": 6}
    fused = np.arange((4 + 2 + 2) * 3 * 5).reshape(24, 5)
    for text, rows in (("([N]+G+G H) D -> N H D", slice(0, 12)), ("(N+[G]+G H) D -> G H D", slice(12, 18)),
                       ("(N+G+[G] H) D -> G H D", slice(18, 24))):  # fmt: skip
        layout = Layout.parse(text)
        assert layout.shape_before(sizes) == (24, 5)
        np.testing.assert_array_equal(layout.apply(fused, sizes), fused[rows].reshape(layout.shape_after(sizes)))
    grouped = fused.reshape(2, 4, 3, 5)  # for each of two groups: two queries, one key, one value
    queries = Layout.parse("(G [R]+1+1 H) D -> (G R) H D")
    np.testing.assert_array_equal(queries.apply(fused, sizes), grouped[:, :2].reshape(4, 3, 5))
    keys = Layout.parse("(G R+[1]+1 H) D -> G H D")
    np.testing.assert_array_equal(keys.apply(fused, sizes), grouped[:, 2])
    positions = np.arange(40).reshape(8, 5)
    np.testing.assert_array_equal(Layout.parse("(2+[C]) D -> C D").apply(positions, sizes), positions[2:])
    scale = np.arange(12)
    assert Layout.parse("(N H) -> N 1 H").apply(scale, sizes).shape == (4, 1, 3)


# ---- parity with transformers ----


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "hidden_act": "relu"},
        {"num_key_value_heads": 1, "head_dim": None, "rope_scaling": SCALINGS[2]},
    ],
    ids=["mha-biases", "gqa-tied-relu", "mqa-llama3"],
)
@pytest.mark.parametrize("shard_size", first_and_slow(1, "4KB", "1GB"))
def test_logits_of_a_random_transformers_model(tmp_path: Path, changes, shard_size):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**checkpoints.config(**changes))).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # biases and norms are not random otherwise
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    reference.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "4KB")
    model, tokenizer = load_model(tmp_path, "float32")
    tokens = [1, 5, 30, 7, 7, 2, 19]
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(checkpoints.logits(model, tokens), expected, atol=1e-5, rtol=1e-5)
    assert tokenizer is None
