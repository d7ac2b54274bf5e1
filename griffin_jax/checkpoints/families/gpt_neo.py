"""GPT-Neo: GPT-2 with unscaled scores and a window on every other layer."""

from __future__ import annotations

from griffin_jax.checkpoints.families.gpt2 import read_gpt_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, read_sizes, windows_of
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.layouts import TensorRule, layer_rules
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "gpt_neo"` describes."""
    attributes.rename(num_layers="num_hidden_layers", num_heads="num_attention_heads")
    attributes.require("hidden_size")
    sizes = read_sizes(
        attributes,
        intermediate_size=4 * attributes.take("hidden_size", int),
        max_position_embeddings=2048,
        bos_token_id=50_256,
        eos_token_id=50_256,
    )
    # The head that summarises a text is not part of a language model.
    attributes.ignore(
        "embed_dropout", "resid_dropout", "summary_type", "summary_use_proj", "summary_activation",
        "summary_proj_to_labels", "summary_first_dropout",
    )  # fmt: skip
    return ModelConfig(
        family="gpt_neo",
        **sizes,
        **read_gpt_fields(attributes, "gelu_new"),
        windows=windows_of(
            attributes.take("window_size", int, default=256), _windowed(attributes, sizes["num_layers"])
        ),
        attention_scale=1.0,
    )


def _windowed(attributes: Attributes, num_layers: int) -> list[bool]:
    """Whether each layer has a window, from lists of kinds, each with how often it is repeated."""
    types = attributes.take("attention_types", list, default=[[["global", "local"], 12]])
    # The same, written out.
    attributes.ignore("attention_layers")
    try:
        # More repetitions than layers are too many already, and are not written out.
        kinds = [kind for kinds, times in types for _ in range(min(times, num_layers + 1)) for kind in kinds]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != num_layers or not set(kinds) <= {"global", "local"}:
        raise ValueError(
            f"{attributes.where}: attention_types must say 'global' or 'local' for {num_layers} layers, such as "
            f"[[['global', 'local'], {num_layers // 2}]], got {types!r}"
        )
    return [kind == "local" for kind in kinds]


RULES = (
    TensorRule("transformer.wte.weight", "embedding", "V D"),
    TensorRule("transformer.wpe.weight", "position_embedding", "C D"),
    TensorRule("transformer.ln_f.weight", "norm.scale", "D"),
    TensorRule("transformer.ln_f.bias", "norm.bias", "D"),
    TensorRule("lm_head.weight", "head", "V D"),
    *layer_rules(
        "transformer.h.{layer}.",
        ("ln_1.weight", "attention_norm.scale", "D"),
        ("ln_1.bias", "attention_norm.bias", "D"),
        ("attn.attention.q_proj.weight", "attention.query", "(N H) D -> N H D"),
        ("attn.attention.k_proj.weight", "attention.key", "(N H) D -> N H D"),
        ("attn.attention.v_proj.weight", "attention.value", "(N H) D -> N H D"),
        ("attn.attention.out_proj.weight", "attention.out", "D (N H) -> N H D"),
        ("attn.attention.out_proj.bias", "attention.out_bias", "D"),
        ("ln_2.weight", "ff_norm.scale", "D"),
        ("ln_2.bias", "ff_norm.bias", "D"),
        ("mlp.c_fc.weight", "ff.up", "F D"),
        ("mlp.c_fc.bias", "ff.up_bias", "F"),
        ("mlp.c_proj.weight", "ff.down", "D F -> F D"),
        ("mlp.c_proj.bias", "ff.down_bias", "D"),
    ),
)

FAMILY = Family(
    model_type="gpt_neo",
    title="GPT-Neo",
    read_config=read_config,
    rules=RULES,
    prefix="transformer.",
    # Causal masks, which old checkpoints hold.
    ignored=(r"transformer\.h\.\d+\.attn\.attention\.(masked_)?bias",),
    copies={"lm_head.weight": "transformer.wte.weight"},
)
