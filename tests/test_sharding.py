"""How a model is divided among devices: the rules, their errors, and the same answers on eight devices as on one."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from griffin_jax.assembly import abstract_model, random_model
from griffin_jax.config import ModelConfig
from griffin_jax.griffin import Experts, prune
from griffin_jax.named import named
from griffin_jax.one_copy import OneCopy
from griffin_jax.sharding import (
    MODEL_AXIS,
    cache_spec,
    check_mesh,
    divided,
    dotted,
    local_shapes,
    model_shardings,
    parameter_spec,
)
from griffin_jax.sizes import Sizes

LLAMA = named("Llama-3-70B", layers=1)
TINY = ModelConfig(
    family="llama", vocab_size=64, width=16, ff_width=48, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4,
    max_positions=64,
)  # fmt: skip


def mesh(devices: int, *others: str) -> AbstractMesh:
    return AbstractMesh((*(2 for _ in others), devices), (*others, MODEL_AXIS))


def specs(model, devices: int) -> dict[str, tuple]:
    leaves = jax.tree.leaves_with_path(model_shardings(model, mesh(devices)))
    return {dotted(path): tuple(sharding.spec) for path, sharding in leaves}


class TestModel:
    def test_every_parameter_of_a_llama(self):
        assert specs(abstract_model(LLAMA), 8) == {
            "embedding": ("model", None),
            "head": ("model", None),
            "norm.scale": (),
            "layers.0.attention_norm.scale": (),
            "layers.0.attention.qkv": ("model", None, None, None),
            "layers.0.attention.out": ("model", None, None),
            "layers.0.ff_norm.scale": (),
            "layers.0.ff.inner": (None, "model", None),
            "layers.0.ff.down": ("model", None),
        }

    def test_biases_of_outputs_and_positions_are_everywhere(self):
        found = specs(abstract_model(named("OPT-13B", layers=1)), 8)
        assert found["layers.0.attention.qkv_bias"] == ("model", None, None)
        assert found["layers.0.ff.inner_bias"] == (None, "model")
        for name in ("layers.0.attention.out_bias", "layers.0.ff.down_bias", "layers.0.ff_norm.bias"):
            assert found[name] == ()
        assert found["position_embedding"] == ()

    def test_norms_of_heads_lie_with_the_heads(self):
        own = specs(abstract_model(dataclasses.replace(TINY, head_norm="own")), 8)
        assert own["layers.1.attention.query_norm.scale"] == own["layers.1.attention.key_norm.scale"]
        assert own["layers.1.attention.key_norm.scale"] == ("model", None, None)
        shared = specs(abstract_model(dataclasses.replace(TINY, head_norm="shared")), 8)
        assert shared["layers.1.attention.key_norm.scale"] == ()

    @pytest.mark.parametrize("sets", [(), (3,)])
    def test_a_pruned_model_is_divided_along_its_kept_neurons(self, sets):
        model = abstract_model(dataclasses.replace(TINY, ff_bias=True))
        experts = Experts(tuple(jnp.zeros((*sets, 16), jnp.int32) for _ in range(2)), (48, 48))
        pruned = jax.eval_shape(prune, model, experts)
        whole = [None] * len(sets)
        found = specs(pruned, 8)
        assert found["layers.1.ff.inner"] == (None, *whole, "model", None)
        assert found["layers.1.ff.inner_bias"] == (None, *whole, "model")
        assert found["layers.1.ff.down"] == (*whole, "model", None)

    def test_attention_that_cannot_be_divided_is_everywhere(self):
        config = named("Qwen2.5-7B", layers=1)
        assert divided(config, 8) == {"heads": False, "neurons": True, "vocabulary": True}
        found = specs(abstract_model(config), 8)
        assert {spec for path, spec in found.items() if ".attention" in path} == {()}
        assert found["layers.0.ff.down"] == ("model", None)
        assert specs(abstract_model(config), 4)["layers.0.attention.out"] == ("model", None, None)

    def test_a_vocabulary_that_cannot_be_divided_is_everywhere(self):
        found = specs(abstract_model(dataclasses.replace(TINY, vocab_size=63)), 8)
        assert found["embedding"] == found["head"] == ()

    def test_other_axes_of_the_mesh_are_left_alone(self):
        shardings = model_shardings(abstract_model(TINY), mesh(8, "data"))
        assert shardings.layers[0].ff.down.get_value().spec == PartitionSpec("model", None)

    def test_similar_names_are_not_mistaken(self):
        assert parameter_spec("position_embedding", 2, TINY, 8) == PartitionSpec()
        assert parameter_spec("embedding", 2, TINY, 8) == PartitionSpec("model", None)


@pytest.mark.parametrize(("kv_heads", "spec"), [(8, (None, "model", None, None)), (2, ())])
def test_keys_and_values_lie_where_their_heads_do(kv_heads, spec):
    assert tuple(cache_spec(dataclasses.replace(TINY, num_kv_heads=kv_heads), 4)) == spec


class TestSizes:
    def test_what_a_device_has(self):
        d, f = 8192, 28672
        shapes = local_shapes(LLAMA, 8)
        assert shapes["layers.0.attention.qkv"] == (1, 10, 128, d)
        assert shapes["layers.0.attention.out"] == (8, 128, d)
        assert shapes["layers.0.ff.inner"] == (2, f // 8, d)
        assert shapes["head"] == (16032, d)
        assert local_shapes(LLAMA, 1)["layers.0.ff.down"] == (f, d)

    @pytest.mark.parametrize("name", ["Llama-3-70B", "OPT-13B", "Gemma-7B", "Qwen2.5-7B"])
    def test_the_shares_are_the_model(self, name):
        config = named(name, layers=2)
        one, each = (Sizes(config, 2, 64, 2, shared=True, devices=n) for n in (1, 8))
        whole = {p: s for p, s in local_shapes(config, 1).items() if local_shapes(config, 8)[p] == s}
        everywhere = sum(map(math.prod, whole.values())) * 2
        kept = [config.ff_width // 2] * 2
        for rows in (None, kept):
            assert 8 * each.weights(rows) - one.weights(rows) == 7 * everywhere
            assert 8 * each.ff(rows) == one.ff(rows)
        assert each.parameters == one.parameters
        assert one.cache == each.cache * (1 if name.startswith("Qwen") else 8)
        assert each.step(None) - each.step(kept) == each.ff(kept)


class TestErrors:
    @pytest.mark.parametrize(
        ("devices", "kept", "message"),
        [
            (5, (), "5 devices cannot share the 48 neurons .* evenly; these can: 1, 2, 3, 4, 6, 8$"),
            (8, (16, 20), r"8 devices cannot share 20 kept neurons evenly: .*--multiple 8; .* --multiple 512\)"),
            (0, (), "devices must be a whole number of at least 1, got 0"),
            (True, (), "got True"),
            (2.0, (), "got 2.0"),
        ],
    )
    def test_meshes_that_do_not_divide_the_neurons(self, devices, kept, message):
        with pytest.raises(ValueError, match=message):
            check_mesh(TINY, devices, kept)

    def test_a_model_that_does_not_fit(self):
        with pytest.raises(ValueError, match="5 devices cannot share"):
            model_shardings(abstract_model(TINY), mesh(5))

    def test_a_mesh_without_the_axis(self):
        with pytest.raises(ValueError, match="the mesh has no axis 'model'; its axes are 'data'"):
            model_shardings(abstract_model(TINY), AbstractMesh((4,), ("data",)))

    def test_neurons_in_two_groups(self):
        one = OneCopy(random_model(TINY))
        one.prune(Experts(tuple(jnp.arange(16) for _ in range(2)), (48, 48)))
        with pytest.raises(ValueError, match="two groups"):
            model_shardings(one.model, mesh(2))


EIGHT_DEVICES = """
import dataclasses, sys
import jax, numpy as np
import griffin_jax as gj
from griffin_jax import jitted
from griffin_jax.assembly import random_model
from griffin_jax.sharding import MODEL_AXIS, cache_shardings, model_shardings

assert len(jax.devices()) == 8
mesh = jax.sharding.Mesh(np.asarray(jax.devices()), (MODEL_AXIS,))
config = gj.ModelConfig(
    family="llama", vocab_size=64, width=16, ff_width=48, num_layers=2, num_heads=16, num_kv_heads=int(sys.argv[1]),
    head_dim=4, max_positions=64,
)
whole = random_model(config, seed=3)
tokens, lengths = gj.pad([[5, 7, 11, 13], [2, 3]], 16)


def answer(model, place):
    prefilled = jitted.prefill(model, tokens, lengths, room=16)
    experts = jitted.select(prefilled.statistics, gj.GriffinConfig(density=0.5))
    pruned = place(gj.prune(model, experts))
    decoded = jitted.decode(pruned, jitted.begin(prefilled), 16)
    return np.asarray(prefilled.logits), experts, np.asarray(decoded.tokens), pruned, decoded


def divide(model):
    return jax.device_put(model, model_shardings(model, mesh))


one, eight = answer(whole, lambda model: model), answer(divide(whole), divide)
np.testing.assert_allclose(eight[0], one[0], atol=1e-5)
jax.tree.map(np.testing.assert_array_equal, eight[1], one[1])
np.testing.assert_array_equal(eight[2], one[2])
assert eight[3].layers[0].ff.down.sharding.shard_shape((2, 24, 16)) == (2, 3, 16)
cache = eight[4].cache
wanted = cache_shardings(cache, config, mesh)
assert wanted.positions.spec == wanted.cursor.spec == jax.sharding.PartitionSpec()
placed = jax.tree.map(lambda array, sharding: array.sharding.is_equivalent_to(sharding, array.ndim), cache, wanted)
assert all(jax.tree.leaves(placed)), placed
print("same")
"""


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_eight_devices_answer_as_one(kv_heads):
    """In a process of its own, where the CPU counts as eight devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    command = [sys.executable, "-c", EIGHT_DEVICES, str(kv_heads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.stdout.split() == ["same"], result.stderr
