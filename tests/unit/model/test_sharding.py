"""How a model is divided among devices: the rules and their errors."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_cases, feed_forward_structure, first_of_each, model_config
from conftest import drawn_adapter, every_and_slow, first_and_slow
from jax.sharding import AbstractMesh, PartitionSpec

from griffin_jax.adapters.adapter import attach, stack
from griffin_jax.checkpoints.huggingface import read_hf_config
from griffin_jax.extensions.in_place import InPlace
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import pad
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.griffin.prune import prune
from griffin_jax.model.assembly import abstract_model, assemble, disassemble, parameter_shapes, random_model
from griffin_jax.model.cache import empty_cache
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.named import named
from griffin_jax.model.sharding import (
    cache_shardings,
    check_mesh,
    divided,
    dotted,
    model_shardings,
    parameter_spec,
    with_kv_copies,
)
from griffin_jax.model.sizes import Sizes, bytes_of, local_arrays
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.parallel.mesh import MODEL_AXIS

CASES = all_cases()
LLAMA = named("Llama-3-70B", layers=1)
TINY = ModelConfig(
    family="llama", vocab_size=64, width=16, ff_width=48, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4,
    max_positions=64,
)  # fmt: skip


def mesh(devices: int, *others: str) -> AbstractMesh:
    return AbstractMesh((*(2 for _ in others), devices), (*others, MODEL_AXIS))


def specs(model, devices: int, *others: str) -> dict[str, tuple]:
    leaves = jax.tree.leaves_with_path(model_shardings(model, mesh(devices, *others)))
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
            "layers.0.ff.gate_up": (None, "model", None),
            "layers.0.ff.down": ("model", None),
        }

    def test_biases_of_outputs_and_positions_are_everywhere(self):
        found = specs(abstract_model(named("OPT-13B", layers=1)), 8)
        assert found["layers.0.attention.qkv_bias"] == ("model", None, None)
        assert found["layers.0.ff.gate_up_bias"] == (None, "model")
        for name in ("layers.0.attention.out_bias", "layers.0.ff.down_bias", "layers.0.ff_norm.bias"):
            assert found[name] == ()
        assert found["position_embedding"] == ()

    def test_norms_of_heads_lie_with_the_heads(self):
        own = specs(abstract_model(dataclasses.replace(TINY, head_norm="own")), 8)
        assert own["layers.1.attention.query_norm.scale"] == own["layers.1.attention.key_norm.scale"]
        assert own["layers.1.attention.key_norm.scale"] == ("model", None, None)
        shared = specs(abstract_model(dataclasses.replace(TINY, head_norm="shared")), 8)
        assert shared["layers.1.attention.key_norm.scale"] == ()

    @pytest.mark.parametrize(("sets", "axes"), [((), ()), ((3,), (None,)), ((4,), ("data",))])
    def test_a_pruned_model_is_divided_along_its_sequences_and_kept_neurons(self, sets, axes):
        model = abstract_model(dataclasses.replace(TINY, ff_bias=True))
        experts = ExpertNeurons(tuple(jnp.zeros((*sets, 16), jnp.int32) for _ in range(2)), (48, 48))
        pruned = jax.eval_shape(prune, model, experts)
        whole = list(axes)
        found = specs(pruned, 8, "data")
        assert found["layers.1.ff.gate_up"] == (None, *whole, "model", None)
        assert found["layers.1.ff.gate_up_bias"] == (None, *whole, "model")
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
        assert parameter_spec("position_embedding", (64, 16), TINY, mesh(8)) == PartitionSpec()
        assert parameter_spec("embedding", (64, 16), TINY, mesh(8)) == PartitionSpec("model", None)

    def test_parts_of_a_checkpoint_lie_as_the_parameter_that_they_become(self):
        config = dataclasses.replace(TINY, attention_bias=True, ff_bias=True, num_kv_heads=4)
        shapes = parameter_shapes(config)
        found = {path: tuple(parameter_spec(path, shapes[path], config, mesh(4))) for path in shapes}
        layer = {path.removeprefix("layers.1."): spec for path, spec in found.items() if path.startswith("layers.1.")}
        heads, head_biases = ("model", None, None), ("model", None)
        for part in ("query", "key", "value"):
            assert (layer[f"attention.{part}"], layer[f"attention.{part}_bias"]) == (heads, head_biases)
        assert layer["ff.gate"] == layer["ff.up"] == layer["ff.down"] == ("model", None)
        assert layer["ff.gate_bias"] == layer["ff.up_bias"] == ("model",)
        assert layer["attention_norm.scale"] == layer["ff.down_bias"] == ()


@pytest.mark.usefixtures("shapes_for_arrays")
class TestEveryArrayHasARule:
    @pytest.mark.parametrize("family", every_and_slow(3, *CASES))
    def test_of_every_family(self, family, tmp_path):
        from transformers import AutoConfig

        seen = set()
        for number, attributes in enumerate(CASES[family].variants.values()):
            folder = tmp_path / str(number)
            AutoConfig.for_model(family, **{**CASES[family].config, **attributes}).save_pretrained(folder)
            _, config = read_hf_config(folder)
            if (arrays := tuple(parameter_shapes(config).items())) in seen:
                continue
            seen.add(arrays)
            divided = specs(abstract_model(config), 2, "data")
            if config.routed(0):
                assert divided["layers.0.ff.experts.down"] == (None, "model", None)
            else:
                assert divided["layers.0.ff.down"] == ("model", None)
            for path, shape in parameter_shapes(config).items():
                parameter_spec(path, shape, config, mesh(2, "data"))
            cache = jax.eval_shape(lambda config=config: empty_cache(config, 4, 32))
            cache_shardings(cache, config, mesh(2, "data"))

    @pytest.mark.parametrize("sets", [(), (4,)], ids=["shared", "each"])
    @pytest.mark.parametrize(("family", "variant"), sorted(first_of_each(feed_forward_structure)))
    def test_of_pruned_layers(self, family, variant, sets):
        full = abstract_model(model_config(family, {**CASES[family].config, **CASES[family].variants[variant]}))

        def pruned(full):
            indices = (jnp.zeros((*sets, 16), jnp.int32),) * full.config.num_layers
            return prune(full, ExpertNeurons(indices, full.neurons))

        assert specs(jax.eval_shape(pruned, full), 2, "data").keys() == specs(full, 2, "data").keys()

    @pytest.mark.parametrize(
        ("path", "shape"),
        [
            ("layers.0.ff.routes", (4, 16)),
            ("layers.0.other_norm.scale", (16,)),
            ("layers.0.ff.rest.down", (24, 16)),
            ("layers.0.ff.down", (48,)),
            ("norm.scale", (2, 16)),
            ("", ()),
        ],
    )
    def test_others_are_an_error(self, path, shape):
        message = re.escape(f"no rule says how {path!r} of shape {shape} is divided among devices: add one to ")
        with pytest.raises(ValueError, match=message):
            parameter_spec(path, shape, TINY, mesh(2))


@pytest.mark.parametrize(("kv_heads", "heads"), [(8, "model"), (2, None)])
@pytest.mark.parametrize(("batch", "sequences"), [(4, "data"), (3, None)])
def test_keys_and_values_lie_where_their_sequences_and_heads_are(kv_heads, heads, batch, sequences):
    config = dataclasses.replace(TINY, num_kv_heads=kv_heads)
    cache = empty_cache(config, batch, 32)
    arrays = {"keys": cache.keys[1], "values": cache.values[0], "positions": cache.positions, "context": cache.context}
    at = mesh(8, "data")
    found = {name: parameter_spec(name, array.shape, config, at) for name, array in arrays.items()}
    assert (*found["keys"], None, None)[:2] == (*found["values"], None, None)[:2] == (sequences, heads)
    assert (*found["positions"], None)[0] == (*found["context"], None)[0] == sequences


class TestKeyValueHeadsThatAreFewerThanDevices:
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "devices", "copies"),
        [
            (8, 8, 8, 1),
            (8, 8, 2, 1),
            (8, 2, 8, 4),
            (8, 1, 4, 4),
            (12, 3, 2, 2),
            (40, 10, 8, 4),
            (28, 4, 8, 1),
            (8, 2, 16, 1),
        ],
    )
    def test_how_often_each_is_held(self, heads, kv_heads, devices, copies):
        config = with_kv_copies(dataclasses.replace(TINY, num_heads=heads, num_kv_heads=kv_heads), devices)
        assert (config.num_kv_heads, config.kv_copies) == (kv_heads, copies)
        assert divided(config, devices)["heads"] == (heads % devices == 0)
        assert with_kv_copies(config, 1).kv_copies == 1

    @pytest.mark.parametrize("head_norm", first_and_slow(2, "none", "joint", "shared", "own"))
    def test_copies_change_nothing(self, head_norm):
        config = dataclasses.replace(TINY, num_kv_heads=2, head_norm=head_norm, attention_bias=True)
        shapes = parameter_shapes(config)
        rng = np.random.default_rng(0)
        weights = {path: (rng.standard_normal(shape) / 4).astype(np.float32) for path, shape in shapes.items()}
        copied = with_kv_copies(config, 8)
        assert parameter_shapes(copied) == shapes
        models = [assemble(one, weights.items(), jnp.float32) for one in (config, copied)]
        back = dict(disassemble(models[1]))
        assert back.keys() == weights.keys()
        for path, array in weights.items():
            np.testing.assert_array_equal(back[path], array)
        assert fingerprint(models[0]) == fingerprint(models[1])
        tokens, lengths = pad([[5, 7, 11, 13, 2], [9, 8, 7]], 16)
        one, many = (jitted.prefill(model, tokens, lengths, max_new_tokens=16) for model in models)
        assert many.cache.keys[0].shape == (2, 8, 4, 32)
        np.testing.assert_allclose(one.logits, many.logits, rtol=1e-5, atol=1e-5)
        repeated = jnp.repeat(one.cache.values[1], 4, axis=1)
        np.testing.assert_allclose(many.cache.values[1], repeated, rtol=1e-5, atol=1e-5)

    @pytest.mark.thorough
    def test_fingerprints_of_adapters_are_those_without_copies(self):
        """One for all sequences, and one for each."""
        config = dataclasses.replace(TINY, num_kv_heads=2, num_layers=1)
        one = random_model(config)
        many = assemble(with_kv_copies(config, 8), disassemble(one), jnp.float32)
        adapters = [drawn_adapter(config, seed) for seed in (1, 2)]
        found = set()
        for given in ((adapters[0],), (adapters[1],), (stack(adapters), [0, 1])):
            prints = {fingerprint(attach(model, *given)) for model in (one, many)}
            assert len(prints) == 1
            found |= prints
        assert len(found) == 3

    def test_a_config_says_what_does_not_fit(self):
        with pytest.raises(ValueError, match="num_heads 8 is not a multiple of num_kv_heads 2 x 8"):
            dataclasses.replace(TINY, num_kv_heads=2, kv_copies=8)
        with pytest.raises(ValueError, match="kv_copies must be a whole number of at least 1, got 0"):
            dataclasses.replace(TINY, kv_copies=0)


class TestSizes:
    def test_what_a_device_has(self):
        d, f = 8192, 28672
        precision = Precision.of(jnp.bfloat16)
        shapes = {path: array.shape for path, array in local_arrays(LLAMA, 8, precision).items()}
        assert shapes["layers.0.attention.qkv"] == (1, 10, 128, d)
        assert shapes["layers.0.attention.out"] == (8, 128, d)
        assert shapes["layers.0.ff.gate_up"] == (2, f // 8, d)
        assert shapes["head"] == (16032, d)
        assert local_arrays(LLAMA, 1, precision)["layers.0.ff.down"].shape == (f, d)

    @pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
    @pytest.mark.parametrize("name", ["Llama-3-70B", "OPT-13B", "Gemma-7B", "Qwen2.5-7B"])
    def test_the_shares_are_the_model(self, name, weights):
        config, precision = named(name, layers=2), Precision.of(jnp.bfloat16, WeightFormat.parse(weights))
        one, each = (Sizes(config, 2, 64, precision, shared=True, devices=n) for n in (1, 8))
        parts = local_arrays(config, 8, precision)
        whole = [array for path, array in local_arrays(config, 1, precision).items() if parts[path] == array]
        everywhere = sum(map(bytes_of, whole))
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
            (8, (16, 20), r"8 devices cannot share 20 kept neurons evenly: .*--round-to 8; .* --round-to 512\)"),
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
        one = InPlace(random_model(TINY))
        one.prune(ExpertNeurons(tuple(jnp.arange(16) for _ in range(2)), (48, 48)))
        with pytest.raises(ValueError, match="two groups"):
            model_shardings(one.model, mesh(2))
