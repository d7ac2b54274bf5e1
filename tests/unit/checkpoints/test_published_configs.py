"""Configurations as they were published, with what they leave out, name in an older way, or have for nobody."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from unit.checkpoints.published import PUBLISHED

from griffin_jax.checkpoints.families import families
from griffin_jax.checkpoints.huggingface import read_hf_config
from griffin_jax.cli import main
from griffin_jax.model.assembly import parameter_shapes
from griffin_jax.model.config import ModelConfig

pytestmark = pytest.mark.filterwarnings("ignore::griffin_jax.utils.messages.CheckpointWarning")

EXACTLY = {"SmolLM2-135M": 134_515_008, "gpt2": 124_439_808, "pythia-70m": 70_426_624}
"""Numbers of parameters that are published to the last one."""


def written(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def read(folder: Path, name: str) -> ModelConfig:
    return read_hf_config(written(folder, PUBLISHED[name][1]))[1]


def size(shapes: dict[str, tuple[int, ...]], layers: int = 1) -> int:
    """The parameters of a model with one layer, as if it had more of them."""
    return sum(math.prod(shape) * (layers if path.startswith("layers.") else 1) for path, shape in shapes.items())


def test_every_family_of_the_table_is_among_them():
    assert {values["model_type"] for _, values in PUBLISHED.values()} == set(families())


@pytest.mark.parametrize("name", PUBLISHED)
def test_they_have_the_published_number_of_parameters(name, tmp_path):
    config, millions = read(tmp_path, name), PUBLISHED[name][0]
    # All layers of a kind have the same shapes, and tracing each of 80 takes most of a second.
    single = dataclasses.replace(config, num_layers=1, windows=config.windows[:1], unrotated_layers=(), routing=None)
    dense = 0 if config.routing is None else len(config.routing.dense_layers)
    parameters = size(parameter_shapes(single), dense if config.routing else config.num_layers)
    if config.routing is not None:
        routing = dataclasses.replace(config.routing, dense_layers=())
        layer = parameter_shapes(dataclasses.replace(single, routing=routing))
        layer = {path: shape for path, shape in layer.items() if path.startswith("layers.")}
        parameters += size(layer, config.num_layers - dense)
    if millions is not None:
        assert parameters / 1e6 == pytest.approx(millions, rel=0.015)


@pytest.mark.parametrize("name", EXACTLY)
def test_small_ones_have_it_exactly(name, tmp_path):
    assert size(parameter_shapes(read(tmp_path, name))) == EXACTLY[name]


@pytest.mark.parametrize("name", ["distilgpt2", "pythia-70m", "Ministral-3-3B-Instruct-2512"])
def test_info_describes_a_config_file_alone(name, tmp_path, capfd):
    file = written(tmp_path, PUBLISHED[name][1]) / "config.json"
    assert main.main(["info", "--model", str(file), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["parameters"] / 1e6 == pytest.approx(PUBLISHED[name][0], rel=0.015)


def read_alike(values: dict[str, Any]) -> bool:
    """Whether what transformers writes out in full is the same model."""
    from transformers import AutoConfig

    family = families()[values["model_type"]]
    # It puts more into the dictionaries that it is given.
    filled = json.loads(AutoConfig.for_model(**copy.deepcopy(values)).to_json_string())
    return family.model_config(values, "given") == family.model_config(filled, "filled")


@pytest.mark.parametrize("name", PUBLISHED)
def test_they_are_read_as_transformers_reads_them(name):
    assert read_alike(PUBLISHED[name][1])


@pytest.mark.parametrize("name", ["num_key_value_heads", "head_dim", "eos_token_id", "bos_token_id"])
def test_null_means_what_it_means_to_transformers(name):
    """Some classes have a default for null, which need not be that of a configuration without the attribute."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    filled = []
    for _, published in PUBLISHED.values():
        values = {**copy.deepcopy(published), name: None}
        if name == "head_dim" and "hidden_size" in published:
            # So that it is not the size of heads that a class has by default.
            values["hidden_size"] *= 2
        try:
            full = json.loads(AutoConfig.for_model(**copy.deepcopy(values)).to_json_string())
        except (AttributeError, StrictDataclassError):
            continue
        if full.get(name) is not None:
            family = families()[values["model_type"]]
            assert family.model_config(values, "given") == family.model_config(full, "filled"), family.model_type
            filled.append(family.model_type)
    assert bool(filled) == (name != "bos_token_id")


def test_layers_that_are_not_named_are_those_of_transformers():
    values = dict(PUBLISHED["Olmo-3-1025-7B"][1])
    del values["layer_types"]
    assert read_alike(values)


def test_what_they_mean(tmp_path):
    gemma, hunyuan, exaone = (
        read(tmp_path, name) for name in ("gemma-3-4b-it", "Hunyuan-7B-Instruct", "EXAONE-4.0-32B")
    )
    assert (gemma.vocab_size, gemma.num_heads, gemma.max_positions) == (262_208, 8, 131_072)
    assert gemma.eos_token_ids == (1, 106)
    assert hunyuan.rotary is not None
    assert hunyuan.rotary.theta == pytest.approx(11_158_839.9251)
    assert exaone.unrotated_layers == tuple(range(3, 64, 4))


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("Qwen2-0.5B", {"use_mrope": False}),
        ("gemma-2-9b", {"sliding_window_size": 4096}),
        ("Llama-2-7b-hf", {"_flash_attn_2_enabled": True}),
        ("SmolLM3-3B", {"max_window_layers": 28}),
    ],
)
def test_attributes_without_effect_in_transformers_are_no_reason_to_refuse(tmp_path, name, attributes):
    values = PUBLISHED[name][1]
    without = {key: value for key, value in values.items() if key not in attributes}
    configs = [read_hf_config(written(tmp_path, each))[1] for each in ({**values, **attributes}, without)]
    assert configs[0] == configs[1]


def test_a_llama_of_early_transformers_has_the_context_of_its_class(tmp_path):
    values = {key: value for key, value in PUBLISHED["Llama-2-7b-hf"][1].items() if key != "max_position_embeddings"}
    assert read_hf_config(written(tmp_path, values))[1].max_positions == 2048
