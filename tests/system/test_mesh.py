"""Eight devices: the same answers as on one, and what they communicate."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest
from conftest import DEVICES, PASSAGES, first_and_slow
from jax.sharding import Mesh
from reference import TinyLlama, oracle_topk, tiny_tokenizer

import griffin_jax as gj
from griffin_jax.aot.compilation import inspect
from griffin_jax.aot.hlo import Module
from griffin_jax.bench import runner
from griffin_jax.checkpoints import sources
from griffin_jax.checkpoints.native import NativeCheckpoint
from griffin_jax.cli import bench
from griffin_jax.cli.main import main, parser_of
from griffin_jax.evaluation.general_text import measure, with_budgets
from griffin_jax.generation import jitted
from griffin_jax.griffin import prune as pruning
from griffin_jax.model import named
from griffin_jax.model.assembly import random_model
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.sharding import model_shardings, parameter_spec
from griffin_jax.parallel.mesh import checked_mesh, make_mesh, parse_mesh

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICES, reason=f"XLA_FLAGS is set, and not to {DEVICES} devices")

MESHES = [(1, 8), (2, 4), (4, 2), (8, 1)]
RAGGED = [PASSAGES[0][:40], PASSAGES[1][:9], PASSAGES[2][:23], "a", *(text[:30] for text in PASSAGES[1:])]


@functools.cache
def built(folder, kv_heads: int) -> TinyLlama:
    tiny_tokenizer(folder, PASSAGES, 320)
    return TinyLlama.build(
        folder, vocab_size=320, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=kv_heads,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fewer(tmp_path_factory) -> TinyLlama:
    """With fewer key/value heads than devices."""
    return built(tmp_path_factory.mktemp("fewer"), 2)


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> TinyLlama:
    """A model with as many key/value heads as devices, beside its native checkpoint."""
    folder = tmp_path_factory.mktemp("native")
    model = built(folder, 8)
    gj.convert(folder, folder / "converted", progress=False)
    return model


def tokens(llm: gj.LLM, prompts=RAGGED, **options) -> list[list[int]]:
    """By default with the best neurons of all, whatever the devices."""
    return llm.generate(prompts, max_new_tokens=6, ignore_eos=True, **({"groups": 1} | options)).tokens


def assert_same(found, expected) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


class TestAnswers:
    @pytest.mark.thorough
    @pytest.mark.parametrize("shape", first_and_slow(1, *MESHES))
    def test_dense_and_pruned(self, native, shape):
        llm = gj.load(native.folder, "float32", mesh=make_mesh(*shape))
        for options in ({"density": 1.0}, {}):
            assert tokens(llm, **options) == tokens(native.llm, **options)

    @pytest.mark.slow
    @pytest.mark.parametrize("shape", MESHES)
    def test_key_value_heads_that_are_fewer_than_devices(self, fewer, shape):
        llm = gj.load(fewer.folder, "float32", mesh=make_mesh(*shape))
        for options in ({"density": 1.0}, {}):
            assert tokens(llm, **options) == tokens(fewer.llm, **options)

    @pytest.mark.slow
    @pytest.mark.parametrize("shape", MESHES[:2])
    def test_experts_of_every_kind(self, native, shape):
        llm = gj.load(native.folder / "converted", "float32", mesh=make_mesh(*shape))
        for options in (
            {"shared": True},
            {"groups": 8},
            {"groups": 8, "shared": True, "method": "topk_sample", "temperature": 1.0, "seed": 3},
        ):
            assert tokens(llm, **options) == tokens(native.llm, **options)
        for options in ({"method": "sample", "groups": 1}, {"groups": 8, "density": 0.75}):
            found, expected = (one.experts(RAGGED, **options) for one in (llm, native.llm))
            assert found.groups == expected.groups
            assert_same(found, expected)

    @pytest.mark.slow
    def test_devices_keep_their_own_best_by_default(self, native):
        llm = gj.load(native.folder / "converted", "float32", mesh=make_mesh(2, 4))
        found, expected = llm.experts(RAGGED), native.llm.experts(RAGGED, groups=4)
        assert found.groups == 4
        assert_same(found, expected)
        assert tokens(llm, groups=None) == tokens(native.llm, groups=4)
        rows = [[5, 7, 11, 13, 2], [9, 8, 7, 6, 5]]
        logits = [one.logits(rows, prompt_length=3, groups=groups) for one, groups in ((llm, None), (native.llm, 4))]
        np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)

    @pytest.mark.slow
    def test_batches_that_do_not_divide(self, native):
        llm = gj.load(native.folder / "converted", "float32", mesh=make_mesh(2, 4))
        for options in ({}, {"shared": True, "groups": 4}):
            assert tokens(llm, RAGGED[:3], **options) == tokens(native.llm, RAGGED[:3], **options)
        assert tokens(llm, RAGGED[0]) == tokens(native.llm, RAGGED[0])

    @pytest.mark.slow
    def test_streams_logits_and_reconstruction(self, native):
        llm = gj.load(native.folder / "converted", "float32", mesh=make_mesh(4, 2))
        options = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 0.7, "seed": 5, "groups": 1}
        assert list(llm.stream(RAGGED, **options)) == list(native.llm.stream(RAGGED, **options))
        assert tokens(llm, refit=16) == tokens(native.llm, refit=16)
        rows = [[5, 7, 11, 13, 2], [9, 8, 7, 6, 5]]
        found, expected = (np.asarray(one.logits(rows, prompt_length=3, groups=2)) for one in (llm, native.llm))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    def test_a_second_answer_compiles_nothing(self, native, compiled):
        llm = gj.load(native.folder / "converted", "float32", mesh=make_mesh(2, 4))
        options = {"max_new_tokens": 20, "ignore_eos": True, "stop": "nothing like this"}
        first = llm.generate(RAGGED, **options)
        again = llm.generate(RAGGED, **options)
        compiled.clear()
        assert llm.generate(RAGGED, **options).tokens == again.tokens == first.tokens
        assert not compiled

    @pytest.mark.slow
    def test_other_meshes(self, native):
        expected = tokens(native.llm)
        for mesh in (
            Mesh(np.asarray(jax.devices()[:4]), ("model",)),
            Mesh(np.asarray(jax.devices()[2:6]), ("data",)),
            Mesh(np.asarray(jax.devices()).reshape(4, 2), ("model", "data")),
        ):
            llm = gj.load(native.folder, "float32", mesh=mesh)
            assert tokens(llm) == expected
            assert llm.model.embedding[...].sharding.device_set == set(mesh.devices.flat)


@pytest.fixture(scope="module")
def prior(native) -> gj.Prior:
    return measured(native.llm)


def measured(llm: gj.LLM) -> gj.Prior:
    texts = [list(range(start, start + 24)) for start in range(10, 290, 14)]
    found = measure(llm.model, texts[4:], size=4, rows=40, quiet=True)
    return with_budgets(llm.model, found, texts[4:], texts[:4], size=4, quiet=True)


class TestBeyondGriffin:
    @pytest.mark.slow
    def test_a_prior_measured_on_a_mesh(self, native, prior):
        one, eight = prior, measured(gj.load(native.folder, "float32", mesh=make_mesh(2, 4)))
        assert (one.model, one.tokens, one.strength) == (eight.model, eight.tokens, eight.strength)
        for name in ("squares", "sensitivity"):
            for a, b in zip(getattr(one, name), getattr(eight, name), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4)
        for a, b in zip(one.rows, eight.rows, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)  # float16

    @pytest.mark.slow
    def test_command(self, capfd, native, tmp_path):
        arguments = ["prior", "--model", str(native.folder), "--self-generated", "2", "--window", "9", "--rows", "0"]
        for name, mesh in (("one", []), ("eight", ["--mesh", "data=2,model=4"])):
            assert main([*arguments, *mesh, "--output", str(tmp_path / name)]) == 0, capfd.readouterr().err
        one, eight = (gj.Prior.load(tmp_path / name) for name in ("one", "eight"))
        assert one.model == eight.model
        for a, b in zip(one.squares, eight.squares, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)

    @pytest.mark.slow
    def test_answers(self, native, prior):
        llm = gj.load(native.folder, "float32", mesh=make_mesh(2, 4))
        for options in (
            {"prior": prior, "groups": 8},
            {"prior": prior, "quality": "best", "round_to": 4, "refresh_every": 3},
            {"prior": prior, "refit": 16, "shared": True},
            {"speculative": 2, "temperature": 1.0, "seed": 3, "shared": True},
            {"speculative": True, "lookup": True, "density": 1.0},
            {"speculative": 2, "lookup": True, "shared": True},
        ):
            assert tokens(llm, **options) == tokens(native.llm, **options), options


@pytest.mark.slow
def test_copies_of_key_value_heads(fewer, tmp_path):
    """Each device has one of them, and eighths of all else."""
    alone = fewer
    llm = gj.load(fewer.folder, "float32", mesh=make_mesh(1, 8))
    assert (llm.config.num_kv_heads, llm.config.kv_copies) == (2, 4)
    attention = llm.model.layers[1].attention
    assert own(attention.qkv[...]) == (1, 3, 4, 32)
    assert own(attention.out[...]) == (1, 4, 32)
    answer = jitted.init_decode(prefilled(llm.model))
    assert own(answer.cache.keys[0]) == (4, 1, 4, 32)
    text = program(gj.decode, llm.model, answer, np.int32(16))
    found = inspect(text, {own(llm.model.layers[0].ff.down[...])}, {own(answer.cache.keys[0])})
    assert found["collectives_in_layers"] == {"all-reduce": 4}
    assert fingerprint(llm.model) == fingerprint(alone.llm.model)
    saved = gj.load(gj.save(llm.model, tmp_path / "saved"), "float32")
    assert saved.config == alone.llm.config
    assert_same(saved.model, alone.llm.model)


def test_groups_keep_their_own_best(native):
    """The rule of `groups`, in NumPy."""
    sequences, lengths = gj.pad([[5, 7, 11, 13, 2, 4], [9, 8, 7]], 16)
    statistics = jitted.prefill(native.llm.model, sequences, lengths, max_new_tokens=0).statistics
    experts = jitted.select(statistics, gj.GriffinConfig(0.25, groups=4))
    assert experts.groups == 4
    for squares, kept in zip(statistics.squares, experts, strict=True):
        for score, found in zip(np.asarray(squares), np.asarray(kept), strict=True):
            own = [oracle_topk(part, 6) + 24 * number for number, part in enumerate(score.reshape(4, 24))]
            np.testing.assert_array_equal(found, np.concatenate(own))
    assert (np.asarray(experts[0]) != np.asarray(jitted.select(statistics, gj.GriffinConfig(0.25))[0])).any()


WIDTH, NEURONS, LAYERS, BATCH = 64, 512, 2, 4


@functools.cache
def wide(shape: tuple[int, int]) -> gj.Transformer:
    """Large enough for a matrix to be larger than anything else in the program."""
    config = gj.ModelConfig(
        family="llama", vocab_size=64, width=WIDTH, ff_width=NEURONS, num_layers=LAYERS, num_heads=16, num_kv_heads=8,
        head_dim=4, max_positions=64,
    )  # fmt: skip
    model = random_model(config)
    return jax.device_put(model, model_shardings(model, make_mesh(*shape)))


def own(array: jax.Array) -> tuple[int, ...]:
    return array.sharding.shard_shape(array.shape)


def program(function, *arguments) -> str:
    """The HLO of a function. (Lowering makes descriptions of arrays, which checked dataclasses cannot hold.)"""
    leaves, structure = jax.tree.flatten(arguments)
    return jax.jit(lambda *leaves: function(*structure.unflatten(leaves))).lower(*leaves).compile().as_text()


def kinds(text: str) -> set[str]:
    module = Module.parse(text)
    return {collective.kind for collective in module.collectives(module.run())}


def prefilled(model: gj.Transformer) -> gj.Prefilled:
    sequences, lengths = gj.pad([[5, 7, 11, 13], [2, 3], [9, 1, 4], [3]], 16)
    return jitted.prefill(model, sequences, lengths, max_new_tokens=16)


def decoding(model: gj.Transformer, pruned: gj.Transformer) -> dict:
    answer = jitted.init_decode(prefilled(model))
    matrices = {own(matrix[...]) for layer in pruned.layers for matrix in (layer.ff.gate_up, layer.ff.down)}
    caches = {own(array) for array in (*answer.cache.keys, *answer.cache.values)}
    return inspect(program(gj.decode, pruned, answer, np.int32(16)), matrices, caches)


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)])
class TestPrograms:
    def test_prompts_go_where_their_answers_are_written(self, shape):
        model = wide(shape)
        mesh = model.embedding[...].sharding.mesh
        answer = jitted.init_decode(prefilled(model))
        arrays = {"keys": answer.cache.keys[0], "values": answer.cache.values[1], "positions": answer.cache.positions}
        for name, array in arrays.items():
            spec = parameter_spec(name, array.shape, model.config, mesh)
            assert array.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), array.ndim), name

    @pytest.mark.parametrize(
        "config", first_and_slow(2, None, gj.GriffinConfig(groups=8), gj.GriffinConfig(shared=True))
    )
    def test_a_layer_takes_two_sums_and_moves_no_weights(self, shape, config):
        model = wide(shape)
        pruned = model
        if config is not None:
            pruned = gj.prune(model, jitted.select(prefilled(model).statistics, config))
        found = decoding(model, pruned)
        assert found["collectives_in_layers"] == {"all-reduce": 2 * LAYERS}
        # The embedding's row, the largest score, the first token that has it, and whether all rows have ended.
        assert found["collectives_elsewhere"] == {"all-reduce": 3 + (shape[0] > 1)}
        sums, best = (2 * LAYERS + 1) * BATCH // shape[0] * WIDTH * 4, 2 * BATCH // shape[0] * 4
        assert found["communicated_per_step"] == sums + best + (shape[0] > 1)
        assert found["ff_copies_per_call"] == []
        if config is None or config.shared:
            assert found["ff_copies_per_step"] == []
        else:
            # XLA's CPU code reorders the rows of each sequence at every step on one device, too.
            alone = wide((1, 1))
            alone_pruned = gj.prune(alone, jitted.select(prefilled(alone).statistics, config))
            assert found["ff_copies_per_step"] == decoding(alone, alone_pruned)["ff_copies_per_step"]

    @pytest.mark.parametrize("shared", [False, True])
    def test_groups_exchange_no_rows(self, shape, shared):
        model = wide(shape)
        statistics = prefilled(model).statistics
        rows = pruning._neuron_rows(model)
        # A batch that is divided must still agree on what it shares.
        agreed = {"all-reduce"} if shared and shape[0] > 1 else set()
        for groups, exchanged in ((8, set()), (1, {"reduce-scatter"})):
            config = gj.GriffinConfig(shared=shared, groups=groups)
            select = functools.partial(gj.select, config=config)
            assert kinds(program(select, statistics)) == agreed | ({"all-gather"} if exchanged else set())
            experts = jitted.select(statistics, config)
            gather = functools.partial(pruning._gather, refit=None, config=model.config, weights=(model.weights,) * 2)
            assert kinds(program(gather, rows, [], experts)) == exchanged
            alone = gj.ExpertNeurons.from_indices([np.asarray(kept) for kept in experts], experts.neurons)
            pruned = gj.prune(model, experts)
            assert_same(pruned, gj.prune(wide((1, 1)), alone))
            matrices = pruned.layers[1].ff
            sets = () if shared else (BATCH // shape[0],)
            assert own(matrices.down[...]) == (*sets, NEURONS // 2 // shape[1], WIDTH)
            assert own(matrices.gate_up[...]) == (2, *sets, NEURONS // 2 // shape[1], WIDTH)

    def test_reconstruction_exchanges_no_weights(self, shape):
        model = wide(shape)
        sequences, lengths = gj.pad([[5, 7, 11, 13], [2, 3], [9, 1, 4], [3]], 16)
        read = jitted.prefill(model, sequences, lengths, max_new_tokens=0, rows=4)
        experts = jitted.select(read.statistics, gj.GriffinConfig(groups=8))
        gather = functools.partial(pruning._gather, config=model.config, weights=(model.weights,) * 2)
        outputs = [(None, None)] * len(model.layers)
        text = program(gather, pruning._neuron_rows(model), outputs, experts, gj.Reconstruction(read.rows))
        module = Module.parse(text)
        sizes = [collective.size for collective in module.collectives(module.run())]
        assert 0 < max(sizes) < NEURONS // 2 * WIDTH * 4


def small(kv_heads: int) -> gj.ModelConfig:
    return gj.ModelConfig(
        family="llama", vocab_size=64, width=32, ff_width=96, num_layers=2, num_heads=8, num_kv_heads=kv_heads,
        head_dim=4, max_positions=64,
    )  # fmt: skip


@pytest.mark.parametrize(("shape", "kv_heads"), [((1, 8), 2), ((2, 4), 8)])
def test_random_weights_are_made_where_they_lie(shape, kv_heads):
    """And are those of one device, copies of key/value heads included."""
    config = small(kv_heads)
    one, many = random_model(config, seed=3), random_model(config, seed=3, mesh=make_mesh(*shape))
    shardings = model_shardings(many, make_mesh(*shape))
    for array, sharding in zip(jax.tree.leaves(many), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    found, expected = (np.asarray(prefilled(model).logits) for model in (many, one))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


class TestBench:
    @pytest.mark.slow
    def test_bytes_are_those_of_each_device(self, capfd, monkeypatch):
        monkeypatch.setattr(runner, "BANDWIDTH_BYTES", 1 << 16)
        for module in (bench, named):
            monkeypatch.setattr(module, "NAMED", {"tiny": small(2)})
        arguments = ["bench", "--model", "tiny", "--lengths", "9+3", "--batch", "4", "--experts", "shared"]
        arguments += ["--density", "0.5", "--round-to", "4", "--quality", "griffin,best", "--repeats", "1", "--json"]
        assert main([*arguments, "--mesh", "data=2,model=4"]) == 0, capfd.readouterr().err
        out = capfd.readouterr().out.splitlines()
        assert any("divided among the devices of --mesh data=2,model=4" in line for line in out)
        result = json.loads(out[-1])
        assert result["mesh"] == {"data": 2, "model": 4}
        plan = bench.check(parser_of("bench").parse_args(arguments[1:]))
        assert result["parameters"] == plan.sizes(plan.cases[0], runner.Variant(shared=True)).parameters
        assert [row["quality"] for row in result["rows"]] == [None, None, "best"]
        for row, variant in zip(result["rows"], plan.variants(plan.cases[0]), strict=True):
            whole, kept = plan.sizes(plan.cases[0], runner.Variant(shared=True)), plan.kept(variant)
            assert row["kept"] == (kept and list(kept))
            # Half of the sequences; of their two heads each device has a copy of one.
            assert row["cache_bytes"] * 2 * 2 == whole.cache
            if row["prune_bytes"]:
                assert row["prune_bytes"] * 4 == 2 * whole.ff(kept)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--mesh", "model=5"], "5 devices cannot share"),
            (["--mesh", "model=8", "--density", "0.3"], "8 devices cannot share"),
            (["--mesh", "model=2", "--in-place", "--density", "0.5"], "--mesh does not go with --in-place"),
        ],
    )
    def test_refusals(self, capfd, monkeypatch, arguments, message):
        monkeypatch.setattr(bench, "random_model", lambda *_, **__: pytest.fail("weights were made"))
        assert main(["bench", "--model", "Llama-2-7B", "--layers", "1", *arguments]) == 2
        assert message in capfd.readouterr().err


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "axes data and model, such as data=2,model=4; got ''"),
            ("data", "got 'data'|size of a mesh's axis is a whole number of at least 1, got 'data'"),
            ("model=0", "at least 1, got 'model=0'"),
            ("model=-1", "at least 1, got 'model=-1'"),
            ("model=2,model=4", "names model twice"),
            ("tensor=2", "axes data and model"),
        ],
    )
    def test_malformed(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_mesh(text)

    def test_well_formed(self):
        assert parse_mesh("model=4, data=2") == {"data": 2, "model": 4}
        assert parse_mesh("data=3") == {"data": 3, "model": 1}

    def test_too_few_devices(self):
        with pytest.raises(ValueError, match=r"data=4,model=4 takes 16 devices, there are 8 \(cpu\)"):
            make_mesh(4, 4)

    def test_unknown_axes(self):
        with pytest.raises(ValueError, match="'tensor' means nothing here"):
            checked_mesh(Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "tensor")))

    def test_before_weights_are_read(self, native, monkeypatch):
        monkeypatch.setattr(sources.Source, "parameters", lambda *_: pytest.fail("weights were read"))
        monkeypatch.setattr(NativeCheckpoint, "parameters", lambda *_: pytest.fail("weights were read"))
        for folder in (native.folder, native.folder / "converted"):
            with pytest.raises(ValueError, match="5 devices cannot share the 96 neurons"):
                gj.load(folder, mesh=make_mesh(1, 5))
        with pytest.raises(ValueError, match="not both"):
            gj.load(native.folder, mesh=make_mesh(1, 2), sharding=lambda path, shape: pytest.fail("asked"))
        with pytest.raises(ValueError, match="leave out in_place or mesh"):
            gj.load(native.folder, mesh=make_mesh(1, 2), in_place=True)

    def test_kept_neurons_that_devices_cannot_share(self, native):
        llm = gj.load(native.folder, "float32", mesh=make_mesh(1, 8))
        for ask in (
            lambda: llm.generate("a", density=0.3),
            lambda: llm.generate("a", experts=native.llm.experts("a", density=0.3)),
            lambda: llm.logits([[1, 2]], prompt_length=1, density=0.3),
            lambda: gj.prune(llm.model, native.llm.experts("a", density=0.3)),
        ):
            with pytest.raises(ValueError, match=r"8 devices cannot share 28 kept neurons evenly: .*--round-to 8"):
                ask()

    def test_groups(self, native):
        for density, groups, message in (
            (0.5, 5, "5 groups cannot have equally many of 96 neurons"),
            (0.3, 8, "8 groups cannot keep equally many of 28 neurons: .* multiple of 8"),
            (0.5, 0, "groups must be a whole number of at least 1, got 0"),
        ):
            with pytest.raises(ValueError, match=message):
                native.llm.generate("a", density=density, groups=groups)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--mesh", "model=3x"], "at least 1, got 'model=3x'"),
            (["--mesh", "model=16"], "takes 16 devices, there are 8"),
            (["--mesh", "model=5"], "5 devices cannot share the 96 neurons"),
        ],
    )
    def test_command(self, capfd, native, arguments, message):
        code = main(["generate", "--model", str(native.folder), "--prompt", "a", *arguments])
        assert code == 2
        assert message in capfd.readouterr().err


@pytest.mark.slow
def test_evaluation(capfd, native, tmp_path):
    """Experts that each sequence selects for itself, baselines, and refitted rows."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    arguments = ["eval", "divergence", str(tmp_path / "texts.jsonl"), "--model", str(native.folder), "--json"]
    arguments += ["--prompt-tokens", "12", "--new-tokens", "8", "--method", "topk,topk+reconstruction", "--batch", "2"]
    found = []
    for name, mesh in (("one", []), ("eight", ["--mesh", "data=2,model=4"])):
        assert main([*arguments, *mesh, "--output", str(tmp_path / name)]) == 0
        found.append(json.loads(capfd.readouterr()[0].splitlines()[-1]))
    for one, eight in zip(*(results["figures"] for results in found), strict=True):
        assert (one["method"], one["continuation"]) == (eight["method"], eight["continuation"])
        for figure in ("perplexity", "kl", "top1"):
            assert eight[figure] == pytest.approx(one[figure], rel=1e-4, abs=1e-5)
    assert main([*arguments, "--mesh", "data=4,model=2", "--output", str(tmp_path / "odd")]) == 2
    assert "--batch 2 cannot be divided among data=4" in capfd.readouterr().err


class TestFiles:
    @pytest.mark.thorough
    def test_experts_know_their_groups(self, native, tmp_path):
        experts = native.llm.experts(RAGGED[:2], groups=4)
        experts.save(tmp_path / "experts")
        loaded = gj.ExpertNeurons.load(tmp_path / "experts")
        assert loaded.groups == 4
        assert_same(loaded, experts)
        llm = gj.load(native.folder, "float32", mesh=make_mesh(2, 4))
        assert tokens(llm, RAGGED[:2], experts=loaded) == tokens(native.llm, RAGGED[:2], experts=experts)

    def test_groups_that_are_claimed(self):
        with pytest.raises(ValueError, match="some of 2 groups keep more than others"):
            gj.ExpertNeurons.from_indices([[0, 1]], [8], groups=2)
        with pytest.raises(ValueError, match="0 groups cannot have equally many"):
            gj.ExpertNeurons.from_indices([[0, 1]], [8], groups=0)

    @pytest.mark.thorough
    def test_command(self, capfd, native):
        arguments = ["generate", "--model", str(native.folder), "--prompt", "A river", "--max-new-tokens", "6"]
        assert main([*arguments, "--groups", "2"]) == 0
        expected, _ = capfd.readouterr()
        assert main([*arguments, "--groups", "2", "--mesh", "model=2"]) == 0
        assert capfd.readouterr()[0] == expected
