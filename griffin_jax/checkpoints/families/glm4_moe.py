"""GLM-4.5 and GLM-4.6: half of each head turns, and experts are chosen in the way of DeepSeek V3."""

from __future__ import annotations

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.families.qwen3 import HEAD_NORMS
from griffin_jax.checkpoints.families.qwen3_moe import EXPERT_RULES, STACKED_RULES
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.experts import CHOICE_BIAS, read_deepseek_routing, shared_rules
from griffin_jax.checkpoints.schema.family import Family
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


OTHERS = HEAD_NORMS + CHOICE_BIAS + shared_rules("mlp.shared_experts")

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
)
