"""What pruning costs: perplexity, KL divergence from the dense model and top-1 agreement on real text.

Each text gives a prompt (its first tokens, read densely) and the tokens that really follow, which are
teacher-forced through the pruned model. Beside GRIFFIN stand the dense model, magnitude and random
pruning, and an oracle that selects by the statistic of the following tokens themselves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

import griffin_jax as gj
from griffin_jax import demo

METHODS = ("dense", "topk", "oracle", "magnitude", "random")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", metavar="FILE", type=Path, help="JSONL, one text a line")
    parser.add_argument("--field", default="article", help="that holds the text (default: %(default)s)")
    parser.add_argument(
        "--after", metavar="MARK", default="###\nArticle: ",
        help="the text begins behind the last occurrence of this, if any (default: that of 1-shot XSum prompts)",
    )  # fmt: skip
    parser.add_argument(
        "--before", metavar="MARK", default="\n\nSummarize the above",
        help="and ends before this (default: likewise)",
    )  # fmt: skip
    parser.add_argument("--model", default=demo.NAME, help="any model that griffin_jax loads (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=256, metavar="P", help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--density", type=float, default=0.5, help="default: %(default)s")
    parser.add_argument(
        "--limit", type=int, default=16, help="texts to score, those long enough (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> None:
    config = gj.GriffinConfig(options.density)
    if min(options.prompt_tokens, options.new_tokens, options.limit) < 1:
        raise ValueError("--prompt-tokens, --new-tokens and --limit must be at least 1")
    llm = gj.load(options.model)
    if llm.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer")
    length = options.prompt_tokens + options.new_tokens
    if length > llm.config.max_positions:
        raise ValueError(f"{length} tokens are more than the model's context of {llm.config.max_positions}")
    rows: list[list[int]] = []
    for text in _texts(options.texts, options.field, options.after, options.before):
        tokens = llm.tokenizer.encode(text)
        if len(tokens) >= length:
            rows.append(tokens[:length])
        if len(rows) == options.limit:
            break
    if not rows:
        raise ValueError(f"{options.texts}: no text has {length} tokens")

    scores: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
    for index, row in enumerate(tqdm(rows, unit="text")):
        tokens = jnp.asarray([row], jnp.int32)
        logits = {
            method: _logits(llm.model, tokens, options.prompt_tokens, config, method, np.int32(index))
            for method in METHODS
        }
        for method in METHODS:
            score = _score(logits["dense"], logits[method], tokens, options.prompt_tokens)
            scores[method].append(np.asarray(score))

    print(
        f"{options.model}: {len(rows)} texts, prompt {options.prompt_tokens}, next {options.new_tokens} teacher-forced,"
        f" density {options.density}, {llm.model.dtype}"
    )
    print(f"{'selection':12}{'perplexity':>12}{'KL (nats)':>12}{'top-1':>8}")
    results = {}
    for method in METHODS:
        loss, kl, agree = np.mean(scores[method], axis=0)
        results[method] = {"perplexity": float(np.exp(loss)), "kl": float(kl), "top1": float(agree)}
        print(f"{method:12}{np.exp(loss):12.1f}{kl:12.3f}{agree:8.3f}")
    print(json.dumps({"model": options.model, "texts": len(rows), "density": options.density, "results": results}))


def _texts(path: Path, field: str, after: str, before: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = json.loads(line)[field]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no JSON object with a field {field!r}") from error
            if not isinstance(text, str):
                raise ValueError(f"{path}, line {number}: the field {field!r} is no text but {text!r:.50}")
            yield text.rpartition(after)[2].partition(before)[0]


@partial(jax.jit, static_argnames=("prompt", "config", "method"))
def _logits(
    model: gj.Transformer, tokens: Int[Array, "b t"], prompt: int, config: gj.GriffinConfig, method: str, seed: Array
) -> Float[Array, "b t v"]:
    if method == "dense":
        return gj.teacher_forced(model, tokens, tokens.shape[1], config)
    if method != "oracle":
        config = gj.GriffinConfig(config.density, method)  # pyright: ignore[reportArgumentType]
        return gj.teacher_forced(model, tokens, prompt, config, seed=seed)
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1])
    whole = gj.prefill(model, tokens, lengths, room=0).statistics
    head = gj.prefill(model, tokens[:, :prompt], lengths * 0 + prompt, room=0).statistics
    # Rounding leaves a neuron that is silent behind the prompt a little below zero.
    following = jax.tree.map(lambda all_, first: jnp.maximum(all_ - first, 0), whole, head)
    return gj.teacher_forced(model, tokens, prompt, config, experts=gj.select(following, config))


@partial(jax.jit, static_argnames=("prompt",))
def _score(
    dense: Float[Array, "b t v"], pruned: Float[Array, "b t v"], tokens: Int[Array, "b t"], prompt: int
) -> Float[Array, 3]:
    """Mean loss, KL(dense || pruned) and top-1 agreement over the tokens that were decoded.

    They are those behind the prompt. The first of them is predicted by the prompt's own, dense logits.
    """
    dense, pruned = dense[:, prompt - 1 : -1], pruned[:, prompt - 1 : -1]
    p, q = jax.nn.log_softmax(dense), jax.nn.log_softmax(pruned)
    loss = -jnp.take_along_axis(q, tokens[:, prompt:, None], axis=-1).mean()
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1).mean()
    agree = jnp.mean(jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1))
    return jnp.stack([loss, kl, agree])
