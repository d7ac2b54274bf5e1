"""OLMo 3: OLMo 2 with windows, and a rotary embedding that is scaled on the other layers only."""

from __future__ import annotations

from griffin_jax.checkpoints.families import olmo2
from griffin_jax.checkpoints.families.gemma3_text import read_rotaries
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.model.config import ModelConfig

THETA = 500_000.0


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "olmo3"` describes."""
    fields = read_fields(attributes, "olmo3", norm_eps=1e-5, max_position_embeddings=2048, eos_token_id=50_279)
    window = attributes.take("sliding_window", int, default=None if attributes.is_null("sliding_window") else 4096)
    windowed = read_layer_types(attributes, [(layer + 1) % 4 != 0 for layer in range(fields["num_layers"])])
    # `rope_theta` is that of layers without a window; a default that the others share with them is not.
    rotary, local = read_rotaries(
        attributes, fields["max_positions"], fields["head_dim"], theta=THETA, local_theta=THETA
    )
    windows = windows_of(window, windowed)
    return ModelConfig(
        **fields,
        norm_placement="output",
        head_norm="joint",
        rotary=rotary,
        local_rotary=local if windows else None,
        windows=windows,
    )


FAMILY = Family(
    model_type="olmo3",
    title="OLMo 3",
    read_config=read_config,
    rules=olmo2.FAMILY.rules,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    also_gguf=("olmo2",),
)
