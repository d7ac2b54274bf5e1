"""`griffin-jax generate`: answer a prompt with a pruned (or dense) model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from griffin_jax.cli.options import (
    add_dtype_argument,
    add_in_place_argument,
    add_mesh_arguments,
    add_model_argument,
    add_options,
    chosen_healing,
    chosen_mesh,
    load_chosen,
    read_options,
)
from griffin_jax.cli.prior import chosen_prior
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.promise import SHORTEST, Promised
from griffin_jax.generation.config import GenerationConfig
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.llm.llm import LLM, Prompt
from griffin_jax.llm.request import check_options
from griffin_jax.llm.results import Generation
from griffin_jax.parallel import distributed
from griffin_jax.utils.messages import shown

DESCRIPTION = """Reads the prompt with the full model, keeps the feed-forward neurons that took part most, and
writes the answer with those alone. With --quality best, a model that has no prior file yet is measured
first, which takes minutes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_model_argument(parser)
    add_dtype_argument(parser)
    add_mesh_arguments(parser)
    add_in_place_argument(parser)

    prompt = parser.add_argument_group("prompt (several make one batch)")
    prompt.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="the text of a prompt")
    prompt.add_argument(
        "--prompt-file",
        metavar="FILE",
        action="append",
        default=[],
        help="file that holds a prompt (UTF-8); - is stdin",
    )
    add_options(prompt, GenerationConfig, "chat")

    pruning = parser.add_argument_group("pruning")
    add_options(pruning, GriffinConfig)
    pruning.add_argument(
        "--experts", metavar="FILE", help="keep the neurons that --save-experts saved in FILE, whatever the density"
    )
    pruning.add_argument("--save-experts", metavar="FILE", help="save to FILE which neurons were kept")
    beyond = parser.add_argument_group("beyond GRIFFIN")
    add_options(
        beyond, Extensions,
        "quality", "prior", "budgets", "prior_weight", "refit", "healing", "refresh_every", "speculative",
        "lookup", "draft_weights", "mixed_weights", "max_divergence",
    )  # fmt: skip

    answer = parser.add_argument_group("answer")
    add_options(
        answer, GenerationConfig,
        "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
    )  # fmt: skip

    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="print the text while it is written")
    output.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object as the last line: text, tokens, prompt_tokens and finished (lists if there are"
        " several prompts), model, density and method (null with --experts), kept, refreshes, drafting"
        " (null without --speculative), promised (null without --max-divergence), seconds, decode_tokens_per_second",
    )


def run(options: argparse.Namespace) -> None:
    """Writes the answers to the prompts and prints them."""
    prompts: list[Prompt] = [*options.prompt, *map(_read_prompt, options.prompt_file)]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompt-file FILE")
    if options.stream and len(prompts) > 1:
        raise ValueError(f"--stream shows one answer as it is written, there are {len(prompts)} prompts")
    experts = ExpertNeurons.load(options.experts) if options.experts else None
    settings: dict[str, Any] = {
        "griffin": read_options(options, GriffinConfig),
        "extensions": read_options(options, Extensions, prior=chosen_prior(options), healing=chosen_healing(options)),
        "generation": read_options(options, GenerationConfig),
    }
    check_options(options.in_place, **settings)
    settings["experts"] = experts
    if options.save_experts:
        if options.density == 1 and not options.experts:
            raise ValueError("--save-experts: at density 1 nothing is pruned, so there are no experts to save")
        if not Path(options.save_experts).absolute().parent.is_dir():
            raise FileNotFoundError(f"--save-experts: there is no folder {Path(options.save_experts).parent}")

    mesh = chosen_mesh(options)
    same = {name: value for name, value in vars(options).items() if name != "distributed"}
    distributed.check_same("a prompt or an option", (prompts, same))
    start = time.perf_counter()
    llm = load_chosen(options, mesh)
    seconds = {"load": time.perf_counter() - start}
    generation = _streamed(llm, prompts, settings) if options.stream else llm.generate(prompts, **settings)
    seconds |= generation.seconds
    if options.json:
        print(json.dumps(_as_json(generation, options, seconds)))
    else:
        if not options.stream:
            for number, text in enumerate(generation.texts, start=1):
                if len(prompts) > 1:
                    print(f"--- prompt {number}")
                print(shown(text, sys.stdout))
        if distributed.is_first():
            print(_summary(generation, llm, seconds), file=sys.stderr)
    if options.save_experts and generation.experts is not None:
        generation.experts.save(options.save_experts)
    elif options.save_experts:
        print("--save-experts: the dense model was taken, so there are no experts to save", file=sys.stderr)


def _streamed(llm: LLM, prompts: Sequence[Prompt], settings: dict[str, Any]) -> Generation:
    stream = llm.stream(prompts, **settings)
    while True:
        try:
            print(shown(next(stream)[0], sys.stdout), end="", flush=True)
        except StopIteration as stopped:
            print()
            return stopped.value


def _read_prompt(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error


def _as_json(generation: Generation, options: argparse.Namespace, seconds: dict[str, float]) -> dict[str, Any]:
    fields = {
        "text": generation.texts,
        "tokens": generation.tokens,
        "prompt_tokens": generation.prompt_tokens,
        "finished": generation.finished,
    }
    if len(generation.texts) == 1:
        fields = {name: values[0] for name, values in fields.items()}
    rate, drafting, promised = generation.decode_tokens_per_second, generation.drafting, generation.promised
    return {
        **fields,
        "model": options.model,
        "density": None if options.experts else options.density if promised is None else promised.density,
        "method": None if options.experts else options.method,
        "kept": generation.kept,
        "refreshes": generation.refreshes,
        "drafting": None if drafting is None else drafting.counts(),
        "promised": None
        if promised is None
        else {
            "most": promised.most,
            "density": promised.density,
            "divergence": promised.divergence,
            "tokens": promised.tokens,
            "tried": [
                {"density": density, **dataclasses.asdict(outcome)} for density, outcome in promised.tried.items()
            ],
        },
        "seconds": seconds,
        "decode_tokens_per_second": rate if rate == rate else None,
    }


def _summary(generation: Generation, llm: LLM, seconds: dict[str, float]) -> str:
    kept, neurons = sum(generation.kept), sum(llm.model.neurons)
    new = sum(map(len, generation.tokens))
    rate = generation.decode_tokens_per_second
    speed = f", {rate:.1f} tokens/s" if rate == rate else ""
    drafting = generation.drafting
    if drafting is not None:
        kinds = ("drafts", drafting.accepted, drafting.drafted), ("copies", drafting.copies_accepted, drafting.copied)
        found = [f"{right.sum():,} of {made.sum():,} {kind}" for kind, right, made in kinds if made.sum()]
        speed += f"; {' and '.join(found) or 'no drafts'} accepted"
        speed += f" in {drafting.passes:,} passes of the full model"
    promised = "" if generation.promised is None else f" {_kept_promise(generation.promised)};"
    times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    return (
        f"[{sum(generation.prompt_tokens)} prompt tokens, {new} new; {kept:,} of {neurons:,} neurons kept;"
        f"{promised} {times}{speed}]"
    )


def _kept_promise(promised: Promised) -> str:
    """The density that was chosen, and what the trial says about its divergence."""
    if not promised.tried:
        return f"dense, nothing could be tried: a trial takes a prompt of {SHORTEST} tokens, and a density below 1"
    if promised.density == 1:
        return f"dense, since no density kept to {promised.most:g} nats/token"
    return f"density {promised.density:g}, {promised.divergence:.3f} nats/token of {promised.most:g} promised"
