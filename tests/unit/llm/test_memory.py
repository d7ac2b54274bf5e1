"""What work with a model is predicted to need, against the arrays and programs of tiny models; and what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

import griffin_jax as gj
from griffin_jax.checkpoints import loading
from griffin_jax.cli import main, options
from griffin_jax.cli.evaluate import running
from griffin_jax.evaluation import tasks
from griffin_jax.extensions import jitted as jitted_extensions
from griffin_jax.generation import jitted
from griffin_jax.griffin.masked import mask
from griffin_jax.llm.memory import Continued, Needs, Parts, fitting, needs_of
from griffin_jax.llm.request import Request
from griffin_jax.model.assembly import random_model
from griffin_jax.model.weights import Precision
from griffin_jax.utils import memory

FLOATS, HALVES = Precision.of("float32"), Precision.of("bfloat16")
CONFIG = gj.ModelConfig(
    family="llama", vocab_size=300, width=64, ff_width=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    max_positions=4096,
)  # fmt: skip
HALF = [128, 128]
WIDE = dataclasses.replace(CONFIG, width=256, ff_width=1024)
"""Whose kept neurons take more than reading a short prompt."""
HEADS = dataclasses.replace(CONFIG, num_layers=1, num_heads=32, num_kv_heads=8)
"""Whose scores take more than all else."""


@pytest.fixture(scope="module")
def model() -> gj.Transformer:
    return random_model(CONFIG)


def nbytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def prompts(batch: int, length: int) -> tuple[jax.Array, jax.Array]:
    return jnp.ones((batch, length), jnp.int32), jnp.full((batch,), length)


def shapes(batch: int, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)


def check_bound(program: jax.stages.Lowered, parts: Parts, *, at_most: bool = True) -> None:
    """What a program needs by XLA's own figures is no more than is predicted, nor much less if this is `at_most`."""
    analysis = program.compile().memory_analysis()
    assert analysis is not None
    found = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    predicted = sum(parts.values()) - parts["compiled programs"]
    assert found <= predicted + 200_000
    if at_most:
        assert predicted <= 2.5 * found + 1_000_000


@pytest.mark.parametrize("shared", [False, True])
def test_arrays_are_counted_as_they_are(model, shared):
    state = jitted.prefill(model, *prompts(3, 32), max_new_tokens=16, rows=8)
    experts = gj.select(state.statistics, gj.GriffinConfig(0.5, shared=shared))
    needs = Needs(CONFIG, FLOATS)
    parts = needs.generation(3, 32, 16, HALF, shared=shared, rows=8, repeated=True)
    assert parts["weights"] == nbytes(model)
    assert parts["kept neurons"] == gj.prune(model, experts).ff_bytes
    assert parts["cache"] == 2 * (nbytes(state.cache.keys) + nbytes(state.cache.values))
    assert parts["statistics"] == nbytes(state.statistics.squares)
    assert parts["rows of the refit"] == nbytes(state.rows)
    loaded = needs_of(model).generation(3, 32, 16, HALF, shared=shared, rows=8, repeated=True)
    assert loaded == {name: size for name, size in parts.items() if name not in ("weights", "tokenizer")}


@pytest.mark.parametrize(("batch", "length"), [(1, 32), (4, 32), (1, 1024), (3, 512), (1, 2048)])
def test_reading_takes_no_more_than_predicted(batch, length):
    """Of XLA's own figures for the program; of what little is held the tiny model's other arrays are the most."""
    needs = Needs(CONFIG, FLOATS, loaded=True)
    abstract = jax.eval_shape(lambda: random_model(CONFIG))
    program = jitted.prefill.lower(abstract, *shapes(batch, length), max_new_tokens=16, rows=8)
    check_bound(program, needs.generation(batch, length, 16, HALF, shared=True, rows=8))


@pytest.mark.usefixtures("shapes_for_arrays")
@pytest.mark.parametrize(
    ("every", "rows"), [(1000, 0), (1000, 256), (128, 0), pytest.param(8, 0, marks=pytest.mark.slow)]
)
def test_refreshing_takes_no_more_than_predicted(every, rows):
    """The full model reads as many tokens in one pass as there are between two refreshes."""
    abstract = jax.eval_shape(lambda: random_model(HEADS))
    prompt, new = 1024, 1024
    options = {"max_new_tokens": new, "rows": rows}
    state = jax.eval_shape(lambda *given: jitted.prefill(*given, **options), abstract, *shapes(1, prompt))
    decoding = jax.eval_shape(jitted.init_decode, state)
    program = jitted_extensions.refresh.lower(abstract, decoding, state.statistics, every, rows=state.rows)
    needs = Needs(HEADS, FLOATS, loaded=True)
    check_bound(program, needs.generation(1, prompt, new, HALF[:1], rows=rows, every=every), at_most=every == 1000)
    assert "refreshing" not in needs.generation(1, prompt, every, HALF[:1], every=every)


@pytest.mark.usefixtures("shapes_for_arrays")
@pytest.mark.parametrize(
    ("read", "slots", "rows", "trial"),
    [(768, 2048, 256, 0), (1024, 5120, 0, 32), pytest.param(64, 160, 16, 0, marks=pytest.mark.slow)],
)
def test_reading_on_takes_no_more_than_predicted(read, slots, rows, trial):
    """What goes on with a cache attends to all of its slots."""
    abstract = jax.eval_shape(lambda: random_model(HEADS))
    state = jax.eval_shape(lambda model: jitted.start(model, slots, rows=rows), abstract)
    tokens, count = jax.ShapeDtypeStruct((1, read), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    program = jitted.read_more.lower(abstract, state, tokens, count, last=trial)
    needs, continued = Needs(HEADS, FLOATS, loaded=True), Continued(read, slots)
    parts = needs.generation(1, read, 512, HALF[:1], rows=rows, trial=trial, continued=continued)
    check_bound(program, parts)
    assert parts["cache"] == nbytes((state.cache.keys, state.cache.values))


def test_a_cache_that_is_there_is_asked_for_as_far_as_it_grows():
    needs = Needs(HEADS, FLOATS, loaded=True)

    def parts(there: int, read: int = 512) -> Parts:
        return needs.generation(1, 1000, 100, HALF[:1], continued=Continued(read, 2048, there))

    cache = parts(0)["cache"]
    assert "cache" not in parts(2048)
    assert parts(1024) == parts(0) | {"cache": cache // 2}
    # With little to read, that both are there is the most.
    wide = dataclasses.replace(CONFIG, num_kv_heads=4, head_dim=256)
    little = Needs(wide, FLOATS, loaded=True).generation(1, 1000, 16, continued=Continued(16, 8192, 7168))
    assert set(little) == {"compiled programs", "cache"}
    assert little["cache"] == 2 * 2 * 4 * 256 * 8192 * 4
    # What a conversation has recorded stays while it is answered, and is there twice if it is refreshed.
    kept = {"rows": 256, "continued": Continued(16, 64)}
    once, twice = (needs.generation(1, 16, 16, HALF[:1], every=every, **kept) for every in (None, 8))
    assert once["rows of the refit"] == 4 * 256 * 256
    assert twice["rows of the refit"] == 2 * once["rows of the refit"]


@pytest.mark.parametrize(("length", "prompt"), [(1500, 10), (1500, 750), (1500, 1100), (1500, 1500)])
def test_logits_take_no_more_than_predicted(length, prompt):
    """What follows the prompt attends to the slots of the whole text."""
    abstract = jax.eval_shape(lambda: random_model(HEADS))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    program = jitted.teacher_forced.lower(abstract, tokens, prompt, gj.GriffinConfig(0.5))
    check_bound(program, Needs(HEADS, FLOATS, loaded=True).logits(1, length, prompt))


@pytest.mark.usefixtures("shapes_for_arrays")
def test_scoring_with_masks_needs_no_kept_rows(model):
    needs = Needs(CONFIG, FLOATS, loaded=True)
    state = jitted.prefill(model, *prompts(8, 64), max_new_tokens=32)
    masked = mask(model, gj.select(state.statistics, gj.GriffinConfig(0.5)))
    analysis = jitted.teacher_force.lower(masked, state, *prompts(8, 32)).compile().memory_analysis()
    assert analysis is not None
    parts = needs.scoring(8, 64, 32, 2)
    held = nbytes(state.cache) + nbytes(state.statistics)
    predicted = sum(parts.values()) - parts["compiled programs"]
    assert analysis.temp_size_in_bytes + held <= predicted
    assert "kept neurons" not in parts
    more = needs.scoring(8, 64, 32, 2, rows=64, calibration=256)
    assert more["solutions of the refit"] == 4 * 2 * 8 * (64 + 256) * 64


def test_needs_grow_with_the_work():
    # Loading needs most where little is done after it.
    needs = Needs(WIDE, FLOATS, loaded=True)

    def total(batch: int = 2, prompt: int = 64, new: int = 32, **more: object) -> int:
        return sum(needs.generation(batch, prompt, new, [300, 300], **more).values())

    assert total() < total(batch=64) < total(batch=64, prompt=1024) < total(batch=64, prompt=4000)
    assert total(new=500, shared=True) < total(new=500)
    assert total(repeated=True, shared=True) < total(repeated=True)
    assert total(repeated=True, in_place=True) < total(repeated=True, shared=True)
    assert total(rows=256) > total()
    # Scores of the two parts are joined.
    assert needs.logits(1, 4000, 2000)["logits"] == 2 * needs.logits(1, 4000, 4000)["logits"]
    narrow = Needs(WIDE, HALVES, platform="gpu")
    assert narrow.generation(1, 1, 1)["weights"] * 2 == Needs(WIDE, FLOATS).generation(1, 1, 1)["weights"]
    assert "compiled programs" not in narrow.generation(1, 1, 1)


def test_regrouped_rows_need_room_beside_the_old_ones():
    config = dataclasses.replace(CONFIG, ff_width=1 << 14)
    needs = Needs(config, HALVES, platform="gpu", loaded=True)
    dense, pruned = (needs.generation(1, 3, 4, kept, in_place=True) for kept in (None, [1 << 13] * config.num_layers))
    assert "regrouping" not in dense
    assert pruned["regrouping"] == 2 * 2 * config.ff_width * config.width


def test_devices_have_their_share():
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"))
    whole, part = (Needs(CONFIG, HALVES, on, "gpu").generation(8, 512, 128, HALF) for on in (None, mesh))
    assert part["cache"] * 4 == whole["cache"]
    assert part["weights"] < 0.6 * whole["weights"]
    # Devices that are one processor's have one memory.
    assert Needs(CONFIG, FLOATS, mesh).generation(8, 512, 128, HALF)["cache"] == 2 * whole["cache"]


def test_the_largest_batch_that_fits():
    needed = {size: {"cache": size * 10**9} for size in (1, 2, 4)}
    assert fitting(needed, None, "")[0] == 4
    chosen, line = fitting(needed, 3 * 10**9, "")
    assert chosen == 2
    assert line == (
        "batches of 2, which need at most about 2.0 GB of memory, and 3.0 GB are free; of 4 they would need 4.0 GB"
    )
    assert fitting(needed, 10**10, "", wanted=1) == (
        1, "batches of 1, which need at most about 1.0 GB of memory, and 10.0 GB are free"
    )  # fmt: skip
    for wrong in ({"available": 9 * 10**8}, {"available": 3 * 10**9, "wanted": 4}):
        with pytest.raises(MemoryError, match=r"^about \d\.0 GB are needed \(cache \d\.0\), .* are free; hurry$"):
            fitting(needed, advice="hurry", **wrong)


class TestLLM:
    def test_answers_that_do_not_fit_are_refused_before_anything_is_computed(self, tiny, monkeypatch):
        monkeypatch.setattr(memory, "free", lambda devices: 1000)
        monkeypatch.setattr(jitted, "prefill", lambda *_, **__: pytest.fail("computed"))
        with pytest.raises(MemoryError) as error:
            tiny.llm.generate([[5, 6, 7], [8, 9]], max_new_tokens=4)
        assert str(error.value).endswith(
            "take fewer prompts at a time, let them share their neurons (shared=True), shorten prompts or answers or"
            " load weights of fewer bits"
        )
        assert "\n" not in str(error.value)
        with pytest.raises(MemoryError, match=r"load the model with in_place=True \(--in-place\), shorten prompts"):
            tiny.llm.generate([5, 6, 7], max_new_tokens=4)

    def test_experts(self, tiny, monkeypatch):
        needs = needs_of(tiny.llm.model).selecting(2, 3)
        monkeypatch.setattr(memory, "free", lambda devices: sum(needs.values()))
        assert len(tiny.llm.experts([[5, 6, 7], [8, 9]])) == 2
        monkeypatch.setattr(memory, "free", lambda devices: sum(needs.values()) - 1)
        monkeypatch.setattr(jitted, "prefill", lambda *_, **__: pytest.fail("computed"))
        with pytest.raises(MemoryError, match="are free; take fewer or shorter prompts"):
            tiny.llm.experts([[5, 6, 7], [8, 9]])

    def test_refreshes_are_asked_for_by_their_width(self, monkeypatch):
        llm, asked = gj.LLM(random_model(HEADS)), []
        monkeypatch.setattr(memory, "check", lambda parts, *_: asked.append(parts["refreshing"]))
        for every in (128, 1000):
            options = {"max_new_tokens": 1024, "refresh_every": every, "ignore_eos": True}
            llm._plan([[5] * 16], Request.of("generate", **options), stream=False)
        assert asked[1] > 7 * asked[0]

    def test_logits(self, tiny, monkeypatch):
        monkeypatch.setattr(memory, "free", lambda devices: 1000)
        with pytest.raises(MemoryError, match="are free; take fewer or shorter sequences"):
            tiny.llm.logits([[5, 6, 7]], prompt_length=2)

    def test_weights_that_do_not_fit_are_not_loaded(self, tiny, monkeypatch):
        monkeypatch.setattr(memory, "free", lambda devices: 1000)
        monkeypatch.setattr(loading, "assemble", lambda *_: pytest.fail("loaded"))
        with pytest.raises(MemoryError, match=r"\(weights .* are free; take weights of fewer bits"):
            gj.load(tiny.folder)

    def test_weights_of_4_bits_that_do_not_fit_are_not_loaded(self, tiny, monkeypatch):
        """On a CPU each of their numbers is a byte."""
        model = gj.load(tiny.folder, weights="int4:16").model
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        on_their_way = loading.loading_bytes([leaf.size for leaf in jax.tree.leaves(model)], 4)
        monkeypatch.setattr(memory, "free", lambda devices: held + on_their_way - 1)
        with pytest.raises(MemoryError, match=r"\(weights .* are free; take weights of fewer bits"):
            gj.load(tiny.folder, weights="int4:16")

    def test_what_fits_is_answered(self, tiny, monkeypatch):
        needs = needs_of(tiny.llm.model).generation(1, 3, 4, [24] * 2)
        monkeypatch.setattr(memory, "free", lambda devices: sum(needs.values()))
        assert len(tiny.llm.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True).tokens[0]) == 4


class TestCommands:
    @pytest.fixture
    def texts(self, tmp_path):
        file = tmp_path / "texts.jsonl"
        words = "The bridge was built of iron, and the river under it is slow. " * 4
        file.write_text("".join(json.dumps({"text": f"{n} {words}"}) + "\n" for n in range(3)), encoding="utf-8")
        return file

    def arguments(self, worded, texts, tmp_path, *more: str) -> list[str]:
        lengths = ["--prompt-tokens", "24", "--new-tokens", "8", "--no-baselines"]
        return ["eval", "divergence", str(texts), "--model", str(worded.folder), *lengths,
                "--output", str(tmp_path / "output"), *more]  # fmt: skip

    def test_an_evaluation_takes_the_batch_that_fits(self, worded, texts, tmp_path, monkeypatch, capsys):
        needs = Needs(worded.llm.config, FLOATS)
        two, four = (sum(needs.scoring(batch, 24, 8, 2, answers=True).values()) for batch in (2, 4))
        assert two < four
        sizes = []
        divergence = tasks.divergence
        monkeypatch.setattr(
            tasks, "divergence", lambda *args, **more: sizes.append(more["size"]) or divergence(*args, **more)
        )
        monkeypatch.setattr(options.memory, "free", lambda devices: (two + four) // 2)
        assert main.main(self.arguments(worded, texts, tmp_path)) == 0
        assert sizes == [2]
        assert "batches of 2, which need at most about " in capsys.readouterr().err

    def test_a_batch_that_does_not_fit_is_refused_before_loading(self, worded, texts, tmp_path, monkeypatch, capsys):
        needs = Needs(worded.llm.config, FLOATS)
        four = sum(needs.scoring(4, 24, 8, 2, answers=True).values())
        monkeypatch.setattr(options.memory, "free", lambda devices: four - 1)
        monkeypatch.setattr(running, "load_reader", lambda *_: pytest.fail("loaded"))
        assert main.main(self.arguments(worded, texts, tmp_path, "--batch", "4")) == 2
        err = capsys.readouterr().err
        assert err.startswith("griffin-jax eval: about ")
        assert err.endswith("free; take a smaller --batch, --weights of fewer bits or shorter texts\n")
        assert err.count("\n") == 1

    @pytest.mark.parametrize("command", ["prior", "flocking", "analyze"])
    def test_others_are_refused_before_loading(self, worded, texts, tmp_path, monkeypatch, capsys, command):
        monkeypatch.setattr(options.memory, "free", lambda devices: 1000)
        monkeypatch.setattr(options, "load", lambda *_: pytest.fail("loaded"))
        model = str(worded.folder)
        wanted = {
            "prior": ["--self-generated", "2", "--model", model],
            "flocking": [str(texts), "--model", model],
            "analyze": [model, str(texts)],
        }[command]
        output = str(tmp_path / ("prior" if command == "prior" else "folder"))
        assert main.main([command, *wanted, "--output", output]) == 2
        assert "are free; take " in capsys.readouterr().err

    def test_the_harness(self, worded, monkeypatch):
        pytest.importorskip("lm_eval")
        from griffin_jax.evaluation.lm_eval import GriffinLM

        monkeypatch.setattr(memory, "free", lambda devices: None)
        assert GriffinLM(worded.llm, batch_size="auto").batch_size == 8
        assert GriffinLM(worded.llm, batch_size=3).batch_size == 3
        monkeypatch.setattr(memory, "free", lambda devices: 1000)
        with pytest.raises(MemoryError, match="take a smaller batch_size"):
            GriffinLM(str(worded.folder))

    def test_info_says_what_answers_need(self, worded, capsys):
        assert main.main(["info", "--model", str(worded.folder), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        kept = [worded.llm.config.ff_width // 2] * worded.llm.config.num_layers
        room = min(640, worded.llm.config.max_positions)
        new = min(128, room // 2)
        assert facts["memory"]["batch 8, shared"] == Needs(worded.llm.config, FLOATS).generation(
            8, room - new, new, kept, shared=True
        )
        assert main.main(["info", "--model", str(worded.folder)]) == 0
        assert "memory in float32, at most, for prompts of" in capsys.readouterr().out

    def test_a_conversion(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr(memory, "free_of_host", lambda: 1000)
        with pytest.raises(MemoryError, match=r"\(the largest tensor .* convert on a machine with more"):
            gj.convert(tiny.folder, tmp_path / "converted", progress=False)
        assert not (tmp_path / "converted").exists()


def test_a_batch_of_one_and_shared_neurons_need_one_set():
    needs = Needs(WIDE, FLOATS, loaded=True)
    one = needs.generation(1, 32, 16, [512, 512], repeated=True)
    shared = needs.generation(8, 32, 16, [512, 512], shared=True, repeated=True)
    assert one["kept neurons"] == shared["kept neurons"] == 4 * 1024 * 3 * 256
    assert "kept neurons, transposed" not in one | shared
    own = needs.generation(2, 32, 16, [511, 511], repeated=True)
    assert own["kept neurons"] == 2 * 4 * 1022 * 3 * 256
    assert own["kept neurons, transposed"] == own["kept neurons"] * 2 // 3
    plain = dataclasses.replace(WIDE, gated=False)
    assert "kept neurons, transposed" not in Needs(plain, FLOATS, loaded=True).generation(2, 32, 16, [511, 511])


def test_rows_of_adapters_of_each_sequence_are_there_twice_at_a_refresh():
    needs, kept = Needs(WIDE, FLOATS, loaded=True), [512, 512]
    one = needs.generation(1, 16, 16, kept, every=8, adapters=1000)["kept neurons"]
    for every, times in ((8, 2), (16, 1), (None, 1)):
        found = needs.generation(4, 16, 16, kept, shared=True, every=every, adapters=1000)
        assert found["kept neurons"] == times * one


def test_sequences_that_keep_all_neurons_together_need_masks():
    needs = Needs(WIDE, FLOATS, loaded=True)
    found = needs.generation(8, 32, 16, [128, 128], repeated=True)
    assert found["masks"] == 8 * 2 * 1024
    assert not {"kept neurons", "kept neurons, transposed"} & found.keys()
    # One less each, or rows of their own, are copied.
    assert "masks" not in needs.generation(8, 32, 16, [127, 128], repeated=True)
    assert "masks" not in needs.generation(8, 32, 16, [128, 128], rows=16, repeated=True)
