"""An adapted model is a model: whatever is done with models is done with adapted ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import drawn_adapter
from flax import nnx
from safetensors.numpy import load_file, save_file

import griffin_jax as gj
from griffin_jax.adapters import modules
from griffin_jax.adapters.adapter import Adapter, Factors, attach, detach, merge, stack, unmerge, unstack
from griffin_jax.adapters.config import AdapterConfig
from griffin_jax.adapters.modules import modules_of
from griffin_jax.adapters.peft import CONFIG, WEIGHTS, load_adapter, save_adapter
from griffin_jax.extensions.in_place import InPlace
from griffin_jax.extensions.reconstruction import Reconstruction
from griffin_jax.generation import jitted
from griffin_jax.griffin.masked import mask
from griffin_jax.model.assembly import random_model, split
from griffin_jax.model.config import Routing
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.sharding import model_shardings
from griffin_jax.model.weights import dequantise
from griffin_jax.parallel.mesh import make_mesh
from griffin_jax.training.data import Batch
from griffin_jax.training.loss import next_token_loss

TOKENS = np.random.default_rng(1).integers(3, 101, (2, 12)).astype(np.int32)


@jax.jit
def logits(model: gj.Transformer, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _, _ = model(tokens, positions, gj.empty_cache(model.config, *tokens.shape, model.dtype), read_slots=0)
    return model.logits(hidden)


def close(one, other, tolerance: float = 1e-5) -> None:
    one, other = np.asarray(one), np.asarray(other)
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


def differs(one, other) -> bool:
    return bool(np.abs(np.asarray(one) - np.asarray(other)).max() > 1e-2)


def dequantised(model: gj.Transformer) -> gj.Transformer:
    """With what the integers of its layers stand for, as floating numbers."""
    wide = jax.tree.map(lambda leaf: leaf, model)
    for layer in wide.layers:
        ff, attention = layer.ff, layer.attention
        ff.gate_up, ff.down = nnx.Param(ff.gate_up_matrix()), nnx.Param(ff.down_matrix())
        ff.gate_up_scale, ff.down_scale = nnx.data(None), nnx.data(None)
        attention.qkv = nnx.Param(dequantise(attention.qkv[...], attention.qkv_scale[...]))
        attention.out = nnx.Param(dequantise(attention.out[...], attention.out_scale[...]))
        attention.qkv_scale, attention.out_scale = nnx.data(None), nnx.data(None)
    return wide


@pytest.fixture(scope="module")
def model(tiny) -> gj.Transformer:
    return tiny.llm.model


@pytest.fixture(scope="module")
def pair(model) -> list[Adapter]:
    return [drawn_adapter(model.config, 1), drawn_adapter(model.config, 2, rank=5)]


class TestAttach:
    def test_a_new_adapter_and_one_of_rank_0_change_nothing(self, model):
        for rank in (0, 4):
            blank = Adapter.init(model.config, AdapterConfig(rank=rank), jax.random.key(0))
            np.testing.assert_array_equal(logits(attach(model, blank), TOKENS), logits(model, TOKENS))

    def test_all_weights_are_the_models_own(self, model, pair):
        before = fingerprint(model)
        made = attach(model, pair[0])
        assert made.layers[0].ff.gate_up[...] is model.layers[0].ff.gate_up[...]
        assert not model.adapted
        assert made.adapted
        assert not detach(made).adapted
        assert fingerprint(detach(made)) == fingerprint(model) == before
        assert fingerprint(made) != before

    def test_only_the_targets_are_changed(self, model):
        made = attach(model, drawn_adapter(model.config, 1, targets="v_proj, feed_forward"))
        layer = made.layers[0]
        assert layer.attention.out_left is None
        np.testing.assert_array_equal(layer.attention.qkv_left[...][:, :-1], 0)
        assert np.abs(layer.attention.qkv_left[...][:, -1]).min() > 0
        assert differs(logits(made, TOKENS), logits(model, TOKENS))

    def test_rows_of_a_mixed_batch_are_those_alone(self, model, pair):
        """Of different ranks and scales, and one without any, in one program for all choices."""
        other = dataclasses.replace(pair[1], scale=0.7)
        several = stack([None, pair[0], other])
        assert several.stacked == 3
        alone = [logits(model, TOKENS), *(logits(attach(model, one), TOKENS) for one in (pair[0], other))]
        for chosen in ([1, 2], [2, 0], [1, 1]):
            found = logits(attach(model, several, chosen), TOKENS)
            for row, number in enumerate(chosen):
                close(found[row], alone[number][row])

    def test_other_choices_compile_nothing(self, model, pair, compiled):
        several = stack(pair)
        logits(attach(model, several, [0, 1]), TOKENS).block_until_ready()
        compiled.clear()
        logits(attach(model, several, [1, 1]), TOKENS).block_until_ready()
        assert not compiled

    def test_a_stack_gives_its_adapters_back(self, pair):
        again = unstack(stack([pair[0], pair[0]]))
        for one in again:
            assert jax.tree.structure(one) == jax.tree.structure(pair[0])
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(pair[0]), strict=True):
                np.testing.assert_array_equal(a, b)

    @pytest.mark.slow
    def test_integers_stay_what_they_are(self, tiny, pair):
        rounded = gj.load(tiny.folder, "float32", weights="int8").model
        made = attach(rounded, pair[0])
        assert made.layers[0].ff.down[...] is rounded.layers[0].ff.down[...]
        assert made.layers[0].ff.down.dtype == jnp.int8
        close(logits(made, TOKENS), logits(attach(dequantised(rounded), pair[0]), TOKENS))
        batch = Batch(TOKENS, np.asarray([12, 12], np.int32))
        gradients = jax.grad(lambda a: next_token_loss(attach(rounded, a), batch))(pair[0])
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m, a: attach(attach(m, a), a), "has an adapter already"),
            (lambda m, a: attach(m, a, [0, 0]), "an index chooses among the adapters of a stack"),
            (lambda m, a: attach(m, stack([a, a])), "an index chooses among the adapters of a stack"),
            (lambda m, a: attach(gj.prune(m, first(m, 8)), a), "say which neurons it keeps"),
            (
                lambda m, a: Adapter.init(m.config, AdapterConfig(targets="c_attn"), jax.random.key(0)),
                "targets has 'c_attn'",
            ),
            (lambda m, a: stack([None]), "at least one adapter"),
            (lambda m, a: merge(attach(m, stack([a, a]), [0, 1])), "an adapter for each sequence"),
        ],
    )
    def test_what_cannot_be(self, model, pair, change, message):
        with pytest.raises(ValueError, match=message):
            change(model, pair[0])

    def test_an_adapter_of_another_model(self, model, pair):
        name = next(iter(pair[0].factors))
        wrong = Adapter({name: Factors(jnp.zeros((2, 7)), jnp.zeros((32, 2)))}, 1.0)
        with pytest.raises(ValueError, match=r"of another model: .* is 32 x 32, the adapter's 32 x 7"):
            attach(model, wrong)
        with pytest.raises(ValueError, match="no such linear layer"):
            attach(model, Adapter({"lm_head": pair[0].factors[name]}, 1.0))


def test_layers_that_are_not_linear_layers_of_their_own(model, monkeypatch):
    """As where experts are routed: attention can have adapters, the feed-forward layer none."""
    rules = modules.rules_by_path
    without = lambda *given: {path: rule for path, rule in rules(*given).items() if ".ff." not in path}  # noqa: E731
    monkeypatch.setattr(modules, "rules_by_path", without)
    config = dataclasses.replace(model.config, max_positions=77)
    assert {m.kind for m in modules.chosen_modules(config, ("attention",))} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ValueError, match="gate is no linear layer of its own in models of the family llama"):
        modules.chosen_modules(config, ("attention", "feed_forward"))


class TestMerge:
    def test_merged_and_unmerged(self, model, pair):
        made = attach(model, pair[0])
        merged = merge(made)
        assert not merged.adapted
        close(logits(merged, TOKENS), logits(made, TOKENS))
        close(logits(unmerge(merged, pair[0]), TOKENS), logits(model, TOKENS))
        assert merged.layers[0].attention_norm.scale[...] is model.layers[0].attention_norm.scale[...]

    def test_integers_are_not_rounded_anew(self, tiny, pair):
        with pytest.raises(ValueError, match="int8 would be rounded anew"):
            merge(attach(gj.load(tiny.folder, "float32", weights="int8").model, pair[0]))


def first(model: gj.Transformer, kept: int, batch: int | None = None) -> gj.ExpertNeurons:
    """Neurons to keep: other ones in each layer, and in each row of a batch."""

    def rows(layer: int) -> np.ndarray:
        random = np.random.default_rng(layer)
        drawn = [np.sort(random.permutation(48)[:kept]) for _ in range(batch or 1)]
        return np.stack(drawn) if batch else drawn[0]

    return gj.ExpertNeurons.from_indices([rows(layer) for layer in range(2)], model.neurons)


class TestPruning:
    @pytest.mark.parametrize("batch", [None, 2], ids=["shared", "per sequence"])
    @pytest.mark.parametrize("mixed", [False, True], ids=["one", "mixed"])
    def test_either_order(self, model, pair, batch, mixed):
        experts = first(model, 20, batch)
        given = (stack(pair), [1, 0]) if mixed else (pair[0],)
        after = gj.prune(attach(model, *given), experts)
        before = attach(gj.prune(model, experts), *given, experts=experts)
        expected = logits(mask(attach(model, *given), experts), TOKENS)
        close(logits(after, TOKENS), expected)
        close(logits(before, TOKENS), expected)
        assert differs(expected, logits(mask(model, experts), TOKENS))

    def test_merged_before_it_is_pruned(self, model, pair):
        experts = first(model, 20)
        made = attach(model, pair[0])
        close(logits(gj.prune(made, experts), TOKENS), logits(gj.prune(merge(made), experts), TOKENS))

    def test_a_refit_replaces_what_the_adapted_neurons_did(self, model, pair):
        made = attach(model, pair[0])
        prefilled = jitted.prefill(made, TOKENS, np.asarray([12, 12], np.int32), max_new_tokens=0, rows=8)
        experts = gj.select(prefilled.statistics, gj.GriffinConfig(density=0.5))
        refit = Reconstruction(prefilled.rows)
        expected = logits(gj.prune(merge(made), experts, refit=refit), TOKENS)
        close(logits(gj.prune(made, experts, refit=refit), TOKENS), expected, 1e-4)
        close(logits(mask(made, experts, refit=refit), TOKENS), expected, 1e-4)

    def test_magnitudes_are_those_of_the_adapted_matrices(self, model, pair):
        made = attach(model, pair[0])
        for own, merged in zip(gj.magnitude(made), gj.magnitude(merge(made)), strict=True):
            close(own, merged)

    def test_in_place(self, model, pair):
        made = attach(model, pair[0])
        holder = InPlace(jax.tree.map(jnp.array, made))
        experts = first(model, 20)
        close(logits(holder.prune(experts), TOKENS), logits(gj.prune(made, experts), TOKENS))
        close(logits(holder.model, TOKENS), logits(made, TOKENS))


@pytest.mark.slow
def test_on_a_mesh_it_computes_the_same(model, pair):
    mesh = make_mesh(data=2, model=2)
    divided = jax.device_put(model, model_shardings(model, mesh))
    experts = gj.ExpertNeurons.from_indices([np.arange(0, 48, 2)] * 2, model.neurons)
    for given in ((pair[0],), (stack(pair), [1, 0])):
        made, here = attach(divided, *given), attach(model, *given)
        assert "model" in made.layers[0].ff.down_left[...].sharding.spec
        # All arrays of an adapted model have a rule.
        model_shardings(made, mesh)
        tokens = jax.device_put(TOKENS, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        close(logits(made, tokens), logits(here, TOKENS))
        close(logits(gj.prune(made, experts), tokens), logits(gj.prune(here, experts), TOKENS))


class TestFiles:
    def test_a_round_trip(self, model, pair, tmp_path):
        save_adapter(pair[1], tmp_path / "adapter", model.config)
        again = load_adapter(tmp_path / "adapter", model.config)
        close(logits(attach(model, again), TOKENS), logits(attach(model, pair[1]), TOKENS))
        values = json.loads((tmp_path / "adapter" / CONFIG).read_text())
        assert values["target_modules"] == sorted({module.kind for module in modules_of(model.config).values()})

    def test_names_in_full_where_not_all_layers_have_one(self, model, pair, tmp_path):
        name = "model.layers.1.mlp.down_proj"
        save_adapter(Adapter({name: pair[0].factors[name]}, 2.0), tmp_path / "adapter", model.config)
        assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"] == [name]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"use_dora": True}, "not supported: use_dora=True"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
            ({"bias": "all"}, "not supported: bias='all'"),
            ({"rank_pattern": {"q_proj": 4}}, "not supported: rank_pattern"),
            ({"something_new": 3}, "not supported: something_new=3"),
            ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
            ({"r": 0}, "r is 0"),
            ({"r": 4}, "not two factors of rank 4"),
        ],
    )
    def test_a_configuration_that_is_not_understood(self, model, pair, tmp_path, change, message):
        folder = save_adapter(pair[0], tmp_path / "adapter", model.config)
        values = json.loads((folder / CONFIG).read_text()) | change
        (folder / CONFIG).write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            load_adapter(folder, model.config)

    def test_rank_stabilised(self, model, pair, tmp_path):
        folder = save_adapter(pair[0], tmp_path / "adapter", model.config)
        values = json.loads((folder / CONFIG).read_text()) | {"use_rslora": True}
        (folder / CONFIG).write_text(json.dumps(values))
        assert load_adapter(folder, model.config).scale == pytest.approx(4 / 3**0.5)

    @pytest.mark.parametrize(
        ("name", "shape", "message"),
        [
            ("base_model.model.lm_head.lora_A.weight", (3, 32), "lm_head has .* not two factors"),
            ("base_model.model.model.embed_tokens.lora_embedding_A", (3, 101), "is no factor of a linear layer"),
            ("base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight", (3, 31), "of another model"),
        ],
    )
    def test_tensors_that_are_no_adapter_of_this_model(self, model, pair, tmp_path, name, shape, message):
        folder = save_adapter(pair[0], tmp_path / "adapter", model.config)
        tensors = load_file(folder / WEIGHTS) | {name: np.zeros(shape, np.float32)}
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            load_adapter(folder, model.config)

    def test_damaged_files(self, model, pair, tmp_path):
        folder = save_adapter(pair[0], tmp_path / "adapter", model.config)
        for name, message in ((WEIGHTS, "is damaged"), (CONFIG, "is no JSON")):
            broken = Path(shutil.copytree(folder, tmp_path / name))
            (broken / name).write_bytes((folder / name).read_bytes()[:40])
            with pytest.raises(ValueError, match=message):
                load_adapter(broken, model.config)
        with pytest.raises(FileNotFoundError, match=f"there is no {CONFIG}"):
            load_adapter(tmp_path, model.config)

    def test_nothing_is_overwritten_or_half_written(self, model, pair, tmp_path):
        folder = save_adapter(pair[0], tmp_path / "adapter", model.config)
        with pytest.raises(FileExistsError):
            save_adapter(pair[1], folder, model.config)
        with pytest.raises(ValueError, match="2 adapters in one"):
            save_adapter(stack(pair), tmp_path / "two", model.config)
        with pytest.raises(ValueError, match="rank of at least 1"):
            save_adapter(
                Adapter.init(model.config, AdapterConfig(rank=0), jax.random.key(0)), tmp_path / "none", model.config
            )
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


class TestGenerate:
    PROMPTS = ([1, 5, 7, 9], [1, 11, 13])

    @pytest.mark.thorough
    def test_it_answers_as_the_merged_model(self, tiny, pair):
        merged = gj.LLM(merge(attach(tiny.llm.model, pair[0])))
        for density in (1.0, 0.5):
            options = {"density": density, "max_new_tokens": 6}
            expected = merged.generate(self.PROMPTS, **options)
            assert tiny.llm.generate(self.PROMPTS, adapter=pair[0], **options).tokens == expected.tokens
        assert tiny.llm.generate(self.PROMPTS, **options).tokens != expected.tokens

    @pytest.mark.thorough
    def test_every_prompt_its_own(self, tiny, pair):
        for density in (1.0, 0.5):
            options = {"density": density, "max_new_tokens": 6}
            found = tiny.llm.generate(self.PROMPTS, adapter=[pair[1], None], **options).tokens
            alone = [
                tiny.llm.generate(self.PROMPTS[0], adapter=pair[1], **options),
                tiny.llm.generate(self.PROMPTS[1], **options),
            ]
            assert found == [each.tokens[0] for each in alone]

    def test_experts_are_those_that_are_kept(self, tiny, pair):
        options = {"density": 0.5, "max_new_tokens": 2}
        kept = tiny.llm.generate(self.PROMPTS, adapter=pair[0], **options).experts
        found = tiny.llm.experts(self.PROMPTS, adapter=pair[0], density=0.5)
        for own, expected in zip(found, kept, strict=True):
            np.testing.assert_array_equal(own, expected)
        plain = tiny.llm.experts(self.PROMPTS, density=0.5)
        assert any((own != other).any() for own, other in zip(found, plain, strict=True))
        with pytest.raises(TypeError, match="chooses experts and takes none"):
            tiny.llm.experts(self.PROMPTS, experts=plain)

    def test_with_drafts_it_is_the_adapted_models_answer(self, tiny, pair):
        options = {"adapter": pair[0], "max_new_tokens": 6}
        dense = tiny.llm.generate(self.PROMPTS, density=1.0, **options).tokens
        assert tiny.llm.generate(self.PROMPTS, density=0.5, speculative=2, **options).tokens == dense
        assert tiny.llm.generate(self.PROMPTS, density=0.5, refresh_every=1, **options).tokens == dense

    def test_what_cannot_be(self, tiny, pair):
        with pytest.raises(ValueError, match="1 adapters for 2 prompts"):
            tiny.llm.generate(self.PROMPTS, adapter=[pair[0]], max_new_tokens=2)
        with pytest.raises(ValueError, match="draft_weights are a copy"):
            tiny.llm.generate(self.PROMPTS, adapter=pair[0], speculative=True, draft_weights="int8", max_new_tokens=2)
        with pytest.raises(ValueError, match="mixed_weights are rows of the model, which has no adapter"):
            tiny.llm.generate(self.PROMPTS, adapter=pair[0], mixed_weights="int4:16@0.5", max_new_tokens=2)
        for options in ({"refit": 8}, {"method": "magnitude"}):
            with pytest.raises(ValueError, match="prompts with adapters of their own have one each"):
                tiny.llm.generate(self.PROMPTS, adapter=[pair[0], None], max_new_tokens=2, **options)
            for alike in ([pair[0], pair[0]], pair[0]):
                tiny.llm.generate(self.PROMPTS, adapter=alike, max_new_tokens=2, **options)
            tiny.llm.generate(self.PROMPTS, adapter=[pair[0], None], max_new_tokens=2, density=1.0, **options)
        with pytest.raises(ValueError, match="has an adapter already"):
            gj.LLM(attach(tiny.llm.model, pair[0])).generate(self.PROMPTS, adapter=pair[0], max_new_tokens=2)
        with pytest.raises(ValueError, match="with in_place rows of weights move"):
            gj.load(tiny.folder, "float32", in_place=True).generate(self.PROMPTS[0], adapter=pair[0], max_new_tokens=2)


def test_a_native_folder_is_for_the_model_alone(model, pair, tmp_path):
    with pytest.raises(ValueError, match="has an adapter; save that on its own"):
        gj.save(attach(model, pair[0]), tmp_path / "model")
    gj.save(merge(attach(model, pair[0])), tmp_path / "model")
    assert not gj.load(tmp_path / "model", "float32").model.adapted


class TestRoutedExperts:
    """Adapters of attention, next to experts that have none."""

    CONFIG = gj.ModelConfig("mixtral", 101, 32, 48, 1, 4, 2, 8, 64, routing=Routing(6, 2, 20, normalised=True))

    def test_attached_is_merged_is_added_to_the_matrix(self):
        model, adapter = random_model(self.CONFIG), drawn_adapter(self.CONFIG, 0, targets="attention")
        attached = attach(model, adapter)
        merged = merge(attached)
        close(logits(attached, TOKENS), logits(merged, TOKENS))
        query = adapter.factors["model.layers.0.self_attn.q_proj"]
        change = adapter.scale * np.asarray(query.b, np.float64) @ np.asarray(query.a, np.float64)
        after, before = (
            split("layers.0.attention.qkv", each.layers[0].attention.qkv[...], self.CONFIG)["layers.0.attention.query"]
            for each in (merged, model)
        )
        close((np.asarray(after, np.float64) - np.asarray(before, np.float64)).reshape(change.shape), change)

    def test_training_reaches_them_through_the_experts(self):
        """The change of the loss along the gradient is the gradient's square."""
        model, adapter = random_model(self.CONFIG), drawn_adapter(self.CONFIG, 0, targets="q_proj")
        batch, step = Batch(TOKENS, np.asarray([12, 9], np.int32)), 3e-3

        @jax.jit
        def loss(adapter):
            return next_token_loss(attach(model, adapter), batch)

        gradient = jax.jit(jax.grad(loss))(adapter)
        square = sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(gradient))
        ahead, behind = (
            float(loss(jax.tree.map(lambda x, g, sign=sign: x + sign * step * g, adapter, gradient)))
            for sign in (1, -1)
        )
        assert square > 0
        assert (ahead - behind) / (2 * step) == pytest.approx(square, rel=0.02)

    def test_experts_have_none(self):
        with pytest.raises(
            ValueError, match=r"gate of routed experts has no adapter.* has q_proj, k_proj, v_proj, o_p"
        ):
            drawn_adapter(self.CONFIG, 0, targets="feed_forward")
