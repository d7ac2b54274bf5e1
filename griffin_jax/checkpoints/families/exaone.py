"""EXAONE 3, 3.5 and Deep: Llama with the names of GPT-2."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "exaone"` describes."""
    attributes.rename(
        num_layers="num_hidden_layers", layer_norm_epsilon="rms_norm_eps", activation_function="hidden_act"
    )
    fields = read_fields(
        attributes, "exaone", norm_eps=1e-5, num_key_value_heads=8, max_position_embeddings=4096, bos_token_id=1,
        eos_token_id=361,
    )  # fmt: skip
    attributes.ignore("embed_dropout")
    return ModelConfig(
        **fields,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"], theta=500_000.0),
        ff_bias=attributes.take("mlp_bias", bool, default=False),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    # Of published configurations, newer versions of its converter write epsilon as if the norms were LayerNorms.
    attributes.rename(**{"attention.layer_norm_epsilon": "attention.layer_norm_rms_epsilon"})
    return read_gguf_fields(attributes, tensors)


RENAMED = (
    (r"^transformer\.wte\.", "model.embed_tokens."),
    (r"^transformer\.ln_f\.", "model.norm."),
    (r"^transformer\.h\.(\d+)\.ln_1\.", r"model.layers.\1.input_layernorm."),
    (r"^transformer\.h\.(\d+)\.ln_2\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^transformer\.h\.(\d+)\.attn\.attention\.out_proj\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^transformer\.h\.(\d+)\.attn\.attention\.", r"model.layers.\1.self_attn."),
    (r"^transformer\.h\.(\d+)\.mlp\.c_fc_0\.", r"model.layers.\1.mlp.gate_proj."),
    (r"^transformer\.h\.(\d+)\.mlp\.c_fc_1\.", r"model.layers.\1.mlp.up_proj."),
    (r"^transformer\.h\.(\d+)\.mlp\.c_proj\.", r"model.layers.\1.mlp.down_proj."),
)


FAMILY = Family(
    model_type="exaone",
    title="EXAONE 3, EXAONE 3.5, EXAONE Deep",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=(*IGNORED, r"transformer\.rotary\.inv_freq"),
    copies=COPIES,
    renamed=RENAMED,
    gguf=GgufFamily(("exaone",), read_gguf_config, GGUF_RULES, ignored=(r"rope_freqs\.weight",)),
)
