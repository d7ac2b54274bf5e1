"""Architectures by name: as many parameters as their authors published."""

from __future__ import annotations

import math

import pytest

from griffin_jax.model.assembly import parameter_shapes
from griffin_jax.model.named import NAMED, named
from griffin_jax.model.sharding import GPU_TILE

PUBLISHED = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-8B": 8_030_261_248,
    "Mistral-7B": 7_241_732_096,
    "Gemma-7B": 8_537_680_896,
    "Gemma-2-9B": 9_241_705_984,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "Qwen3-32B": 32_762_123_264,
    "Phi-4": 14_659_507_200,
    "OPT-6.7B": 6_658_473_984 - 2 * 4096,  # two rows of the table of positions are never used
    "OPT-13B": 12_853_473_280 - 2 * 5120,
    "ReLULLaMA-7B": 6_738_415_616,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
}
"""Parameters of the checkpoints, tied heads counted once."""


def parameters(name: str) -> int:
    """Counted in one layer and in two: all layers have the same shapes, and there are up to 80 of them."""
    one, two = (
        sum(math.prod(shape) for shape in parameter_shapes(named(name, layers=layers)).values()) for layers in (1, 2)
    )
    return one + (named(name).num_layers - 1) * (two - one)


def test_every_name_is_checked():
    assert PUBLISHED.keys() == NAMED.keys()


@pytest.mark.parametrize("name", NAMED)
def test_parameters_are_the_published_ones(name):
    assert parameters(name) == PUBLISHED[name]


def test_half_of_the_neurons_are_whole_tiles():
    """But for gpt-oss, whose experts have 2,880."""
    widths = {
        name: config.ff_width if config.routing is None else config.routing.width for name, config in NAMED.items()
    }
    assert {name for name, width in widths.items() if width // 2 % GPU_TILE} == {"gpt-oss-20b"}


def test_case_does_not_matter():
    assert named("llama-2-13b") is named("Llama-2-13B")


def test_fewer_layers():
    config = named("Gemma-2-9B", layers=3)
    assert config.num_layers == 3
    assert config.windows == (4096, 0, 4096)
    assert named("Gemma-2-9B", layers=42) == named("Gemma-2-9B")


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(ValueError, match=r"no model named 'gpt-5'; there are Llama-2-7B, .*SmolLM2-1\.7B"):
        named("gpt-5")


@pytest.mark.parametrize("layers", [0, 33, -1, True, 1.5])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match=r"layers must be a whole number in \[1, 32\]"):
        named("Llama-2-7B", layers=layers)
