"""What training is predicted to need, against XLA's own figures of the programs of tiny models; and what is refused."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import first_and_slow

import griffin_jax as gj
from griffin_jax.adapters.adapter import Adapter, attach, parameters_of, stack
from griffin_jax.adapters.config import AdapterConfig, Course
from griffin_jax.adapters.healing_training import healing_loss
from griffin_jax.adapters.jobs import Job, adapter_loss
from griffin_jax.adapters.library import Library
from griffin_jax.cli import main, options
from griffin_jax.evaluation.moin import _losses
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.factor.config import FactorTraining
from griffin_jax.factor.factorize import factored_config
from griffin_jax.factor.layer import trainable
from griffin_jax.factor.training import expert_step, router_step
from griffin_jax.llm.memory import Needs, adapter_bytes
from griffin_jax.model.assembly import random_model
from griffin_jax.model.weights import Precision
from griffin_jax.training.config import TrainingConfig
from griffin_jax.training.data import Batch
from griffin_jax.training.loop import init_state, make_measured_step, make_optimizer, make_step
from griffin_jax.utils import memory

CONFIG = gj.ModelConfig(
    family="llama", vocab_size=300, width=64, ff_width=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    max_positions=4096,
)  # fmt: skip
NEEDS = Needs(CONFIG, Precision.of("float32"), loaded=True)
FACTOR = 2.0
"""How many times what a program takes may be predicted, at most."""


def batch_of(size: int, length: int) -> Batch:
    return Batch(jax.ShapeDtypeStruct((size, length), jnp.int32), jax.ShapeDtypeStruct((size,), jnp.int32))  # pyright: ignore


def taken(step: Any, state: Any, model: Any, batch: Any) -> int:
    """Bytes of the state and of everything that an update makes for a while, as XLA has it."""
    analysis = jax.jit(step, donate_argnums=0).lower(state, model, batch).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def predicted(parts: dict[str, int]) -> int:
    return sum(size for name, size in parts.items() if name != "compiled programs")


@pytest.mark.parametrize(("batch", "length", "at_once"), [(4, 128, 1), pytest.param(1, 300, 3, marks=pytest.mark.slow)])
def test_adapters_take_no_more_than_predicted(batch, length, at_once):
    job = Job(AdapterConfig(rank=4), TrainingConfig(steps=2, batch=batch, length=length, warmup=1))
    state = jax.eval_shape(lambda: job.start(0, CONFIG))
    assert parameters_of(CONFIG, job.adapter) == sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
    step, batches = make_step(adapter_loss, make_optimizer(job.training)), batch_of(batch, length)
    if at_once > 1:
        step = jax.vmap(step, in_axes=(0, None, 0))
        state, batches = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((at_once, *leaf.shape), leaf.dtype), (state, batches)
        )
    found = taken(step, state, jax.eval_shape(lambda: random_model(CONFIG)), batches)
    needed = predicted(NEEDS.adapter_training(parameters_of(CONFIG, job.adapter), batch, length, at_once))
    assert found <= needed <= FACTOR * found


@pytest.mark.thorough
@pytest.mark.parametrize("rows", first_and_slow(1, 64, 0))
def test_healing_takes_no_more_than_predicted(rows):
    course = Course(AdapterConfig(rank=4), TrainingConfig(steps=2, batch=4, length=192, warmup=1), prompt=96)
    optimizer = make_optimizer(course.training)
    state = jax.eval_shape(lambda: init_state(Adapter.init(CONFIG, course.adapter, jax.random.key(0)), optimizer))
    step = make_measured_step(healing_loss(course.prompt), optimizer)
    frozen = jax.eval_shape(lambda: random_model(CONFIG)), Pruner(gj.GriffinConfig(0.5), rows)
    found = taken(step, state, frozen, batch_of(4, 192))
    parameters = parameters_of(CONFIG, course.adapter)
    needed = predicted(NEEDS.healing_training(parameters, 4, 192, rows=rows))
    assert found <= needed <= FACTOR * found


@pytest.mark.thorough
@pytest.mark.parametrize(("steps", "accumulate"), [(2, 2), pytest.param(0, 1, marks=pytest.mark.slow)])
def test_experts_and_routers_take_no_more_than_predicted(steps, accumulate):
    """Of more tokens than what is found before any training is a mean of."""
    training = FactorTraining(
        steps=steps, router_steps=int(not steps), batch=16, length=256, warmup=1, accumulate=accumulate
    )
    config = factored_config(CONFIG, 4, 2)
    model = jax.eval_shape(lambda: random_model(config))
    optimizer = make_optimizer(training.together() if steps else training.routers())
    state = jax.eval_shape(lambda model: init_state(trainable(model, experts=steps > 0), optimizer), model)
    step = expert_step(training) if steps else router_step(config, training)
    found = taken(step, state, model, batch_of(16, 256))
    parts = NEEDS.factor_training(training, 4)
    assert parts.pop("experts") == 4 * 2 * 3 * 256 * 64
    assert found <= predicted(parts) <= FACTOR * found


def test_likelihood_takes_no_more_than_predicted():
    model = jax.eval_shape(lambda: random_model(CONFIG))
    analysis = _losses.lower(model, batch_of(4, 128), jnp.int32(8)).compile().memory_analysis()
    assert analysis is not None
    found, needed = analysis.temp_size_in_bytes, predicted(NEEDS.likelihood(4, 128))
    assert found <= needed <= 2.5 * found


def test_parts_of_a_batch_take_less_than_all_of_it():
    whole, parts = (FactorTraining(steps=1, router_steps=0, batch=16, accumulate=n, warmup=0) for n in (1, 4))
    assert predicted(NEEDS.factor_training(parts, 4)) < predicted(NEEDS.factor_training(whole, 4)) / 3
    assert "activations of all neurons" in NEEDS.factor_training(FactorTraining(batch=1), 4, coactivation=True)


def test_adapters_of_prompts_are_counted(monkeypatch):
    model, options = random_model(CONFIG), AdapterConfig(rank=3)
    one, other = (Adapter.init(CONFIG, options, jax.random.key(seed)) for seed in range(2))

    def added(adapted: gj.Transformer) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(adapted)) - sum(
            leaf.nbytes for leaf in jax.tree.leaves(model)
        )

    assert added(attach(model, one)) <= adapter_bytes(one, 4) == adapter_bytes([one] * 4, 4)
    several = stack([one, other, None])
    of_each = added(attach(model, several, [0, 1, 2])) + 4 * several.parameters
    assert of_each <= adapter_bytes([one, other, None], 3) <= 3 * of_each
    assert adapter_bytes(None, 4) == 0
    asked: list[int] = []

    def refuse(parts: dict[str, int], *_: object) -> None:
        asked.append(parts.get("adapters", 0))
        raise MemoryError

    monkeypatch.setattr(memory, "check", refuse)
    for adapter in (one, None):
        with pytest.raises(MemoryError):
            gj.LLM(model).generate([[1, 2]], adapter=adapter, max_new_tokens=2)
    assert asked == [adapter_bytes(one, 1), 0]


class TestCommands:
    @pytest.fixture
    def refused(self, worded, tmp_path, monkeypatch, capsys):
        """What a command with little memory says, which must not load the model."""
        file = tmp_path / "texts.jsonl"
        lines = [f"Line {n}: the bridge was built of iron." for n in range(4)]
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")

        def run(*arguments: str) -> str:
            monkeypatch.setattr(memory, "free", lambda devices: 1000)
            monkeypatch.setattr(options, "load", lambda *_: pytest.fail("loaded"))
            assert main.main([*arguments, "--model", str(worded.folder)]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            return said

        run.texts = str(file)  # pyright: ignore[reportFunctionMemberAccess]
        return run

    def test_factorize(self, refused, tmp_path):
        arguments = "factorize", str(tmp_path / "small"), "--text", refused.texts, "--length", "16"
        assert "logits" in refused(*arguments, "--steps", "20", "--batch", "512")
        assert refused(*arguments).endswith("are free; take a smaller --batch or a shorter --length\n")

    def test_moin_train(self, worded, refused, tmp_path):
        folder = str(tmp_path / "library")
        cluster = ["moin", "cluster", folder, "--clusters", "2", "--text", refused.texts, "--layers", "1"]
        assert main.main([*cluster, "--model", str(worded.folder)]) == 0
        said = refused("moin", "train", folder, "--length", "16", "--at-once", "5")
        assert "adapters" in said
        assert said.endswith("are free; take fewer --at-once, a smaller --batch or a shorter --length\n")
        assert Library.load(folder).adapter_bytes == 0
        scored = "moin", "eval", folder, "--text", refused.texts, "--prompt-tokens", "4", "--length", "16"
        for said in (refused(*scored), refused(*scored, "--priors")):
            assert said.endswith("are free; take a smaller --batch or a shorter --length\n")
        assert refused("moin", "prior", folder).endswith("take a smaller --batch, a shorter --window or fewer --rows\n")
