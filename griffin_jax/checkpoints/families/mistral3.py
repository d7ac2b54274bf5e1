"""Mistral Small 3.1 and 3.2, Ministral 3 with images: their text model is that of `mistral` or `ministral3`."""

from __future__ import annotations

from griffin_jax.checkpoints.families import ministral3, mistral
from griffin_jax.checkpoints.families.gemma3 import IMAGES, RENAMED
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, read_text_part
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture of the text model that a config.json with `"model_type": "mistral3"` describes."""
    attributes.ignore(
        "vision_config", "image_token_index", "image_token_id", "projector_hidden_act", "vision_feature_layer",
        "multimodal_projector_bias", "spatial_merge_size",
    )  # fmt: skip
    readers = {"mistral": mistral.read_config, "ministral3": ministral3.read_config}
    return read_text_part(attributes, "mistral3", readers)


FAMILY = Family(
    model_type="mistral3",
    title="Mistral Small 3.1 and 3.2, Ministral 3 (text)",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED + IMAGES,
    copies=COPIES,
    also_gguf=("mistral3",),
    renamed=RENAMED,
    leaves_out="images",
    # Transformers' default is a tie, and Mistral Small, which has none, does not say so.
    unsaid_tie=True,
)
