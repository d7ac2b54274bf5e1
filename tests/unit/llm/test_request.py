"""Options: each declared once, given alone or as whole groups, from Python or as flags; and what a seed means."""

import argparse
import dataclasses
import inspect
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import griffin_jax as gj
from griffin_jax.cli.options import add_options, read_options
from griffin_jax.extensions.config import Extensions
from griffin_jax.generation import jitted
from griffin_jax.generation.config import GenerationConfig
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.llm.request import GROUPS, OPTIONS, RENAMED, Request, updated
from griffin_jax.model.assembly import random_model
from griffin_jax.parallel.mesh import make_mesh
from griffin_jax.utils.deprecation import GriffinDeprecationWarning
from griffin_jax.utils.messages import SpeedWarning

PROMPTS = [[5, 6, 7], [9, 8, 7, 60, 61]]


class TestRequest:
    def test_options_find_their_group(self):
        request = Request.of("generate", density=0.25, refit=7, temperature=0.5, stop="x")
        assert request.griffin == GriffinConfig(0.25)
        assert (request.extensions.rows, request.generation.temperature, request.generation.stops) == (7, 0.5, ("x",))

    def test_single_options_replace_those_of_a_whole_group(self):
        griffin = GriffinConfig(0.25, "sample", round_to=8)
        request = Request.of("generate", griffin=griffin, density=0.75)
        assert request.griffin == dataclasses.replace(griffin, density=0.75)
        assert request.generation == GenerationConfig()

    def test_no_option_is_declared_twice(self):
        names = [field.name for group in GROUPS.values() for field in dataclasses.fields(group)]
        assert len(names) == len(set(names)) == len(OPTIONS)

    def test_unknown_options_are_named(self):
        with pytest.raises(TypeError, match=r"generate\(\) got unexpected options: densty"):
            Request.of("generate", densty=0.5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prior": None, "quality": "best"}, "need a prior"),
            ({"quality": "worst"}, "quality must be one of griffin, best, got 'worst'"),
            ({"refresh_every": 0}, "refresh_every must be a whole number of tokens of at least 1, got 0"),
            ({"speculative": True, "refresh_every": 4}, "speculative decoding needs no refresh"),
            ({"ridge": 0.0}, "ridge must be at least 0.001"),
            ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
            ({"seed": 2**31}, "seed must be a whole number"),
            ({"seed": [1, 0.5]}, "seed must be a whole number"),
            ({"groups": 0}, "groups must be a whole number of at least 1, got 0"),
            ({"temperature": 0.0, "top_k": 3}, "top_k need a temperature above 0"),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            Request.of("generate", **options)

    def test_names_of_the_version_before_warn(self):
        values = {"multiple": 4, "shards": 2, "reconstruct": 5, "lossless": 3}
        assert values.keys() == RENAMED.keys()
        with pytest.warns(GriffinDeprecationWarning):
            old = Request.of("generate", **values)
        new = Request.of("generate", **{RENAMED[name]: value for name, value in values.items()})
        assert old.griffin == new.griffin
        assert (old.extensions.rows, old.extensions.drafts) == (new.extensions.rows, new.extensions.drafts) == (5, 3)

    @pytest.mark.parametrize("function", [gj.LLM.generate, gj.LLM.stream, gj.LLM.experts])
    def test_help_names_every_option(self, function):
        assert inspect.signature(function).parameters.keys() >= OPTIONS.keys() | GROUPS.keys()

    def test_best_is_budgets_and_refit(self):
        with pytest.raises(TypeError):
            Extensions.best()  # pyright: ignore[reportCallIssue]
        prior = gj.Prior((jnp.ones(4),), (), "model", 1)
        best = Extensions.best(prior)
        assert best.has_budgets
        assert best.rows == Extensions(prior=prior, refit=True).rows > 0

    def test_an_option_undoes_what_best_turned_on(self):
        best = Extensions.best(gj.Prior((jnp.ones(4),), (), "model", 1))
        plain = Request.of("generate", extensions=best, quality="griffin").extensions
        assert (plain.has_budgets, plain.rows) == (False, 0)


class TestFlags:
    @pytest.fixture
    def parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser()
        for group in GROUPS.values():
            add_options(parser, group)
        return parser

    def test_no_flags_are_the_defaults(self, parser):
        options = parser.parse_args([])
        assert read_options(options, GriffinConfig) == GriffinConfig()
        assert read_options(options, GenerationConfig) == GenerationConfig()
        assert vars(read_options(options, Extensions)) == vars(Extensions())

    def test_every_kind_of_flag(self, parser):
        flags = "--density 0.5,0.25 --method sample --shared --round-to 8 --groups 2 --refit --speculative 3 --lookup"
        flags += " --prior-weight 0.25 --temperature 0.5 --top-k 7 --stop a --stop b --ignore-eos --seed 9"
        flags += " --stop-token-ids 3"
        options = parser.parse_args(flags.split())
        assert read_options(options, GriffinConfig) == GriffinConfig((0.5, 0.25), "sample", True, 8, 2)
        extensions = read_options(options, Extensions)
        assert (extensions.refit, extensions.speculative, extensions.prior_weight) == (True, 3, 0.25)
        assert extensions.lookup
        generation = GenerationConfig(
            temperature=0.5, top_k=7, stop=("a", "b"), stop_token_ids=(3,), ignore_eos=True, seed=9
        )
        assert read_options(options, GenerationConfig) == generation

    def test_flags_of_the_version_before_warn(self, parser):
        with pytest.warns(GriffinDeprecationWarning) as caught:
            options = parser.parse_args(["--multiple", "4", "--reconstruct", "--lossless", "2", "--shards", "2"])
        assert [str(warning.message).rsplit(" ", 1)[1] for warning in caught] == [
            "--round-to", "--refit", "--speculative", "--groups",
        ]  # fmt: skip
        assert (options.round_to, options.refit, options.speculative, options.groups) == (4, True, 2, 2)
        assert "--multiple" not in parser.format_help()

    def test_a_wrong_density_is_one_line(self, parser, capsys):
        with pytest.raises(SystemExit):
            parser.parse_args(["--density", "1.5"])
        assert "argument --density: density must be in (0, 1], got 1.5" in capsys.readouterr().err


class TestSeed:
    OPTIONS = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 1.0, "method": "random"}  # noqa: RUF012

    def test_one_for_each_prompt_does_not_depend_on_the_batch(self, tiny):
        """Neither its neurons nor its tokens."""
        both = tiny.llm.generate(PROMPTS, seed=[3, 4], **self.OPTIONS)
        swapped = tiny.llm.generate(PROMPTS[::-1], seed=[4, 3], **self.OPTIONS)
        assert both.tokens == swapped.tokens[::-1]
        for kept, other in zip(both.experts, swapped.experts, strict=True):
            np.testing.assert_array_equal(kept, other[::-1])

    def test_another_seed_is_another_answer(self, tiny):
        (first, same), (_, other) = (
            tiny.llm.generate([PROMPTS[0]] * 2, seed=seeds, **self.OPTIONS).tokens for seeds in ([3, 3], [3, 4])
        )
        assert first == same != other

    @pytest.mark.parametrize("method", ["sample", "topk_sample", "random"])
    def test_select_draws_for_each_sequence_as_for_it_alone(self, rng, method):
        squares = (jnp.asarray(rng.random((3, 40)), jnp.float32), jnp.asarray(rng.random((3, 24)), jnp.float32))
        statistics = gj.Statistics(squares, jnp.asarray([4, 9, 25], jnp.int32))
        config = gj.GriffinConfig(0.5, method)
        together = gj.select(statistics, config, seed=jnp.asarray([7, 8, 7]))
        for row, seed in enumerate([7, 8, 7]):
            own = gj.Statistics(tuple(s[row : row + 1] for s in squares), statistics.tokens[row : row + 1])
            alone = gj.select(own, config, seed=jnp.asarray([seed]))
            for kept, expected in zip(together, alone, strict=True):
                np.testing.assert_array_equal(kept[row], expected[0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"seed": [1, 2, 3]}, "3 seeds for 2 prompts"),
            (
                {"seed": [1, 2], "method": "random", "shared": True},
                "a seed for each sequence is for neurons of its own",
            ),
        ],
        ids=["three", "shared"],
    )
    def test_refused_before_anything_is_read(self, tiny, monkeypatch, options, message):
        monkeypatch.setattr(jitted, "prefill", None)
        for use in (tiny.llm.generate, tiny.llm.experts):
            with pytest.raises(ValueError, match=message):
                use(PROMPTS, **options)

    def test_shared_neurons_are_drawn_with_one(self, rng):
        statistics = gj.Statistics((jnp.asarray(rng.random((2, 8)), jnp.float32),), jnp.asarray([1, 2], jnp.int32))
        with pytest.raises(ValueError, match="a seed for each sequence is for neurons of its own"):
            gj.select(statistics, gj.GriffinConfig(0.5, "random", shared=True), seed=jnp.asarray([1, 2]))


class TestTiles:
    """XLA for GPUs pads or joins matrices whose rows are no whole tiles."""

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls) -> gj.LLM:
        return gj.LLM(random_model(gj.ModelConfig("llama", 64, 32, 512, 2, 2, 1, 16, 64)))

    @pytest.fixture
    def on_gpu(self, monkeypatch) -> None:
        monkeypatch.setattr(gj.LLM, "_platform", "gpu")

    @pytest.mark.parametrize(
        ("options", "tile"),
        [
            ({"density": 0.3}, 64),
            ({"density": 0.3, "round_to": 64}, None),
            ({"density": 0.25}, None),
            ({"density": (0.25, 0.3)}, 64),
            ({"density": 0.75, "mixed_weights": "int8@0.5"}, 128),
            ({"density": 0.5, "mixed_weights": "int8@0.5"}, None),
            ({"density": 0.6, "mixed_weights": "int8"}, 128),
            ({"density": 1.0}, None),
        ],
        ids=str,
    )
    def test_warned_of(self, llm, on_gpu, options, tile):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", SpeedWarning)
            llm.generate([[5, 6, 7]], max_new_tokens=2, **options)
        said = [str(warning.message) for warning in found if warning.category is SpeedWarning]
        assert len(said) == (tile is not None)
        assert all(f"no multiple of {tile}," in line and f"--round-to {tile}" in line for line in said)

    @pytest.mark.parametrize("shared", [False, True])
    def test_masks_change_no_matrix(self, llm, on_gpu, shared):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", SpeedWarning)
            llm.generate([[5, 6, 7]] * 4, max_new_tokens=2, density=0.3, shared=shared)
        assert len(found) == shared

    def test_other_platforms_have_none(self, llm):
        with warnings.catch_warnings():
            warnings.simplefilter("error", SpeedWarning)
            llm.generate([[5, 6, 7]], max_new_tokens=2, density=0.3)


class TestKeptOnMeshes:
    """Devices need to share the kept rows evenly only where these are copied."""

    @pytest.mark.thorough
    def test_masked_rows_need_not_be_divided(self, tiny):
        """17 of 48 neurons: two sequences of their own are masked, one is copied."""
        divided, options = gj.load(tiny.folder, "float32", mesh=make_mesh(model=2)), {"density": 0.65, "groups": 1}
        tokens = np.asarray([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
        np.testing.assert_allclose(
            divided.logits(tokens, prompt_length=3, **options),
            tiny.llm.logits(tokens, prompt_length=3, **options),
            atol=1e-5,
        )
        options |= {"max_new_tokens": 4, "ignore_eos": True}
        assert divided.generate(tokens, **options).tokens == tiny.llm.generate(tokens, **options).tokens
        with pytest.raises(ValueError, match="2 devices cannot share 31 kept neurons evenly"):
            divided.generate(tokens[:1], **options)

    def test_given_neurons_count_and_not_the_density(self, tiny):
        divided = gj.load(tiny.folder, "float32", mesh=make_mesh(model=2))
        experts = gj.ExpertNeurons.from_indices([np.arange(24)] * 2, tiny.llm.model.neurons)
        options = {"experts": experts, "density": 0.65, "max_new_tokens": 4, "ignore_eos": True}
        assert divided.generate([[5, 6]], **options).tokens == tiny.llm.generate([[5, 6]], **options).tokens

    def test_precise_neurons_must_be_shared_too(self, tiny, monkeypatch):
        divided = gj.load(tiny.folder, "float32", mesh=make_mesh(model=2))
        monkeypatch.setattr(jitted, "prefill", None)
        with pytest.raises(ValueError, match="2 devices cannot share 3 kept neurons evenly"):
            divided.generate([[5, 6]], density=0.5, groups=1, mixed_weights="int8:8@0.13")


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [
        ({"reconstruct": True, "density": 0.5}, {"refit": False}, {"density": 0.5, "refit": False}),
        ({"refit": True}, {"reconstruct": False}, {"reconstruct": False}),
        ({"multiple": 8}, {"griffin": GriffinConfig(0.5)}, {"griffin": GriffinConfig(0.5)}),
    ],
    ids=["old", "new", "group"],
)
def test_an_option_is_replaced_under_either_name(options, changes, expected):
    assert updated(options, changes) == expected


class TestModelOfExperts:
    """Neurons of a layer mean nothing in another model, even if it has equally many."""

    def test_those_of_another_model_are_refused(self, tmp_path):
        config = gj.ModelConfig(
            family="llama",
            vocab_size=64,
            width=16,
            ff_width=40,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            max_positions=64,
        )
        one, other = (gj.LLM(random_model(config, seed=seed)) for seed in (0, 1))
        experts = one.experts([[5, 6]])
        experts.save(tmp_path / "experts.safetensors")
        saved = gj.ExpertNeurons.load(tmp_path / "experts.safetensors")
        assert saved.model == experts.model is not None
        for given in (experts, saved):
            assert one.generate([[5, 6]], experts=given, max_new_tokens=2).tokens
            with pytest.raises(ValueError, match=f"of another model \\(fingerprint {experts.model}, this one has"):
                other.generate([[5, 6]], experts=given, max_new_tokens=2)
        with pytest.raises(ValueError, match="of another model"):
            other.logits([[5, 6, 7]], prompt_length=2, experts=saved)
        unknown = gj.ExpertNeurons.from_indices(list(experts), experts.neurons)
        assert other.generate([[5, 6]], experts=unknown, max_new_tokens=2).tokens
