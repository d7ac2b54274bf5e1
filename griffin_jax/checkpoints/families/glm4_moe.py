"""GLM-4.5 and GLM-4.6: half of each head turns, and experts are chosen in the way of DeepSeek V3."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.families.qwen3 import GGUF_HEAD_NORMS, HEAD_NORMS
from griffin_jax.checkpoints.families.qwen3_moe import EXPERT_RULES, STACKED_RULES
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.experts import (
    CHOICE_BIAS,
    read_deepseek_routing,
    read_gguf_deepseek,
    shared_rules,
)
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, TensorRule
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "glm4_moe"` describes."""
    fields = read_fields(attributes, "glm4_moe", norm_eps=1e-5, num_key_value_heads=8, max_position_embeddings=131_072)
    # A layer that drafts the token after the next one, which transformers does not read either.
    attributes.ignore("num_nextn_predict_layers", "num_mtp_layers")
    # Of query, key and value only.
    fields["attention_out_bias"] = False
    routing = read_deepseek_routing(
        attributes, fields["num_layers"], width=1408, normalised=True, dense=1, n_routed_experts=128,
        num_experts_per_tok=8, n_shared_experts=1,
    )  # fmt: skip
    return ModelConfig(
        **fields,
        head_norm="shared" if attributes.take("use_qk_norm", bool, default=False) else "none",
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"], share=0.5),
        routing=routing,
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json. It counts the drafting layers among the others."""
    values = read_gguf_fields(attributes, tensors)
    drafting = attributes.take("nextn_predict_layers", int, default=0)
    if not 0 <= drafting < values["num_hidden_layers"]:
        raise ValueError(
            f"{attributes.where}: nextn_predict_layers is {drafting} of block_count {values['num_hidden_layers']}"
        )
    return (
        values
        | read_gguf_deepseek(attributes)
        | {
            "num_hidden_layers": values["num_hidden_layers"] - drafting,
            # `read_gguf_sizes` leaves it out where whole heads turn.
            "partial_rotary_factor": values.get("partial_rotary_factor", 1.0),
            "attention_bias": "blk.0.attn_q.bias" in tensors.shapes,
            "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors.shapes,
        }
    )


OTHERS = HEAD_NORMS + CHOICE_BIAS + shared_rules("mlp.shared_experts")

GGUF_NORM = TensorRule("blk.{layer}.post_attention_norm.weight", "layers.{layer}.ff_norm.scale", "D")

FAMILY = Family(
    model_type="glm4_moe",
    title="GLM-4.5, GLM-4.5-Air, GLM-4.6",
    read_config=read_config,
    rules=RULES + EXPERT_RULES + OTHERS,
    alternatives=(RULES + STACKED_RULES + OTHERS,),
    prefix="model.",
    # The numbers of the drafting layers, which come after the last one.
    ignored=(*IGNORED, r"model\.layers\.(46|92)\..*"),
    copies=COPIES,
    gguf=GgufFamily(("glm4moe",), read_gguf_config, (*GGUF_RULES, *GGUF_HEAD_NORMS, GGUF_NORM)),
)
