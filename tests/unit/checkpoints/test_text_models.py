"""The text models of models that read images, too."""

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
