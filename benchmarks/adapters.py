"""Measures what an adapter costs: decoding with it, merged or not, and the choice of an adapter, relative to the base.

With `--train`, it measures instead what updates of several adapters take, one after the other and at once.

All are run in turn, and only the ratios count. The adapter's numbers are random, which is as fast as trained ones. The
last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from griffin_jax.adapters.adapter import Adapter, attach, merge
from griffin_jax.adapters.config import AdapterConfig
from griffin_jax.adapters.embedding import Embedder, EmbeddingConfig
from griffin_jax.adapters.jobs import adapter_loss
from griffin_jax.checkpoints import demo
from griffin_jax.generation import jitted
from griffin_jax.llm.llm import load
from griffin_jax.model.transformer import Transformer
from griffin_jax.training.config import TrainingConfig
from griffin_jax.training.data import Batch
from griffin_jax.training.loop import init_state, make_optimizer, make_step
from griffin_jax.utils import memory

LENGTH = 128
"""Number of tokens of a training sequence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=demo.NAME, help="(default: %(default)s)")
    parser.add_argument("--weights", metavar="FORMAT", help="as for griffin-jax generate")
    parser.add_argument("--rank", type=int, default=8, metavar="R", help="of the adapter (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=999, metavar="T", help="prompt tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, metavar="N", help="tokens to decode (default: %(default)s)")
    parser.add_argument(
        "--train",
        type=int,
        default=0,
        metavar="N",
        help="measure updates of N adapters instead, at once and in turn (default: none)",
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="of each timing (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    llm = load(options.model, weights=options.weights)
    if options.train:
        _run_training(llm.model, options)
        return
    prompt = np.random.default_rng(0).integers(0, llm.config.vocab_size, options.prompt).tolist()
    adapter = Adapter.init(llm.config, AdapterConfig(rank=options.rank), jax.random.key(0))
    models = {"base": llm.model, "adapted": attach(llm.model, adapter)}
    if not llm.model.weights.quantised:
        models["merged"] = merge(models["adapted"])
    work = {f"decode, {name}": _decoding(model, prompt, options.new) for name, model in models.items()}
    embedder = Embedder(EmbeddingConfig(), llm.model)
    work["prefill, base"] = functools.partial(_seconds, _prefill(llm.model, prompt))
    work["choice"] = functools.partial(_seconds, lambda: embedder([prompt]))
    of_base = {name: "decode, base" for name in work if name.startswith("decode")} | {"choice": "prefill, base"}
    print(json.dumps(_compared(work, of_base, options.repeats) | {"rank": options.rank}))


def _compared(work: Mapping[str, Callable[[], float]], of_base: Mapping[str, str], repeats: int) -> dict[str, Any]:
    """Time all functions in turn, print how long each takes relative to another one, and return the medians.

    Args:
        work: functions that return the seconds they took, by name.
        of_base: for each name, the name that it is compared with.
        repeats: number of rounds, after one more round that compiles.
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, one in work.items():
            seconds = one()
            if repeat:
                found[name].append(seconds)
    ratios = {
        name: float(np.median(np.divide(found[name], found[base]))) for name, base in of_base.items() if name != base
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} of {of_base[name]}")
    medians = {name: float(np.median(values)) for name, values in found.items()}
    return {"ratios": ratios, "seconds": medians, "repeats": repeats}


def _run_training(model: Transformer, options: argparse.Namespace) -> None:
    updates = _training(model, options.rank, options.train)
    work = {name: functools.partial(_seconds, one.run) for name, one in updates.items()}
    found = _compared(work, {"updates at once": "updates in turn"}, options.repeats)
    for name, one in updates.items():
        each = options.train / found["seconds"][name]
        print(f"{name}: {each:.2f} a second, {memory.shown(one.bytes)} of memory next to the base")
    found["bytes"] = {name: one.bytes for name, one in updates.items()}
    print(json.dumps(found | {"rank": options.rank, "adapters": options.train}))


@dataclasses.dataclass(frozen=True)
class Updates:
    """One training update of each of several adapters.

    Attributes:
        bytes: size of their states and of the temporaries of one program, according to XLA.
        run: makes the updates.
    """

    bytes: int
    run: Callable[[], Any]


def _training(model: Transformer, rank: int, count: int) -> dict[str, Updates]:
    """One update of each of `count` adapters, with one sequence of `LENGTH` tokens each: in turn, and at once."""
    config = TrainingConfig(steps=2, batch=1, length=LENGTH, warmup=1)
    optimizer = make_optimizer(config)
    step = make_step(adapter_loss, optimizer)
    random = np.random.default_rng(0)
    tokens = random.integers(0, model.config.vocab_size, (count, 1, LENGTH)).astype(np.int32)
    batches = [Batch(jnp.asarray(each), jnp.full(1, LENGTH, jnp.int32)) for each in tokens]
    states = [init_state(Adapter.init(model.config, AdapterConfig(rank=rank), jax.random.key(0)), optimizer)] * count
    states_together, batches_together = (jax.tree.map(lambda *a: jnp.stack(a), *each) for each in (states, batches))
    alone = jax.jit(step).lower(states[0], model, batches[0]).compile()
    vmapped = jax.jit(jax.vmap(step, in_axes=(0, None, 0)))
    together = vmapped.lower(states_together, model, batches_together).compile()
    return {
        "updates in turn": Updates(
            _bytes(alone, states[0]), lambda: [alone(s, model, b)[0] for s, b in zip(states, batches, strict=True)]
        ),
        "updates at once": Updates(
            _bytes(together, states_together), lambda: together(states_together, model, batches_together)[0]
        ),
    }


def _bytes(program: Any, state: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes + sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def _prefill(model: Transformer, prompt: list[int]) -> Callable[[], Any]:
    tokens, lengths = np.asarray([prompt], np.int32), np.asarray([len(prompt)], np.int32)
    return lambda: jitted.prefill(model, tokens, lengths, max_new_tokens=0, collect=False).logits


def _decoding(model: Transformer, prompt: list[int], new: int) -> Callable[[], float]:
    """A function that returns the seconds of decoding alone, each time after the same prompt."""
    tokens, lengths = np.asarray([prompt], np.int32), np.asarray([len(prompt)], np.int32)
    prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=new, collect=False)

    def decode() -> float:
        copied = jax.tree.map(lambda leaf: leaf.copy(), prefilled)
        state = jax.block_until_ready(jitted.init_decode(copied))
        return _seconds(lambda: jitted.decode(model, state, np.int32(new), eos=()).tokens)

    return decode
