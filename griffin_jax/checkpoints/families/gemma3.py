"""Gemma 3 4B to 27B, which read images, too: their text model is that of `gemma3_text`."""

from __future__ import annotations

from griffin_jax.checkpoints.families import gemma3_text
from griffin_jax.checkpoints.families.llama import COPIES
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, read_text_part
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture of the text model that a config.json with `"model_type": "gemma3"` describes."""
    attributes.ignore(
        "vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index",
        "image_token_id", "boi_token_id", "eoi_token_id",
    )  # fmt: skip
    return read_text_part(attributes, "gemma3", {"gemma3_text": gemma3_text.read_config})


# Before transformers 4.52 the text model had a head of its own, later the whole has it.
RENAMED = (
    (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?", "model."),
)
IMAGES = (r"(model\.)?(vision_tower|multi_modal_projector)\..*",)

FAMILY = Family(
    model_type="gemma3",
    title="Gemma 3 4B, 12B and 27B, MedGemma (text)",
    read_config=read_config,
    rules=gemma3_text.FAMILY.rules,
    prefix="model.",
    ignored=gemma3_text.FAMILY.ignored + IMAGES,
    copies=COPIES,
    also_gguf=("gemma3",),
    renamed=RENAMED,
    leaves_out="images",
)
