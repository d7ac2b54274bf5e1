"""The command line: `griffin-jax generate | convert | info | families | compile | bench | eval | ...`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from griffin_jax import __version__
from griffin_jax.analysis import flocking
from griffin_jax.aot import compilation
from griffin_jax.bench import runner
from griffin_jax.checkpoints import families, loading
from griffin_jax.checkpoints.native import NativeCheckpoint
from griffin_jax.checkpoints.planning import NarrowingWarning
from griffin_jax.cli import evaluate as evaluation
from griffin_jax.cli.options import add_dtype_argument, add_mesh_arguments, add_model_argument, chosen_mesh
from griffin_jax.evaluation import general_text
from griffin_jax.extensions.prior import DEFAULT_WEIGHT, Prior
from griffin_jax.extensions.reconstruction import DEFAULT_ROWS
from griffin_jax.extensions.speculative import DEFAULT_DRAFTS
from griffin_jax.griffin.config import GriffinConfig, Method
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.llm.llm import LLM, OPTIONS, Generation, Prompt, Quality, check_options, load
from griffin_jax.model.assembly import NEURON_MAJOR
from griffin_jax.parallel import distributed

BAD_INPUT = 2
INTERRUPTED = 130
LM_EVAL = "lm-eval"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, or 2 with one line on stderr for bad input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    if arguments[:1] == [LM_EVAL]:
        # All the rest is lm_eval's, --help too; argparse has no way to leave options alone.
        return guarded(f"{parser.prog} {LM_EVAL}", lambda: _lm_eval(arguments[1:]))
    options = parser.parse_args(arguments)
    return guarded(f"{parser.prog} {options.command}", lambda: _run(options))


def _run(options: argparse.Namespace) -> int | None:
    with distributed.joined(getattr(options, "distributed", None)):
        return options.run(options)


def guarded(name: str, command: Callable[[], int | None]) -> int:
    """Runs a command; what is wrong with its input becomes one line on stderr and exit code 2.

    A warning that weights lose something becomes one line on stderr, too.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", NarrowingWarning)
            usual = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
                if issubclass(category, NarrowingWarning):
                    print(f"{name}: warning: {message}", file=sys.stderr)
                else:
                    usual(message, category, *rest, **more)

            warnings.showwarning = show
            code = command() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has what it wanted; without this Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{name}: {message}", file=sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="griffin-jax", description="GRIFFIN (arXiv 2404.01365) for JAX.")
    parser.add_argument("--version", action="version", version=f"griffin-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "generate",
        help="answer a prompt with a pruned (or dense) model",
        description="Reads the prompt with the full model, keeps the feed-forward neurons that took part most,"
        " and writes the answer with those alone.",
    )
    _add_generate_arguments(command)
    command.set_defaults(run=_generate)

    command = commands.add_parser("convert", help="write a checkpoint in the native format")
    loading.add_arguments(command)
    command.set_defaults(run=loading.run)

    command = commands.add_parser("info", help="describe a model without loading its weights")
    add_model_argument(command)
    command.add_argument("--density", type=_density, default=0.5, help="density to describe (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_info)

    command = commands.add_parser("families", help="list the model families that are supported, and what is refused")
    command.set_defaults(run=lambda options: print(families.table()))

    command = commands.add_parser(
        "compile",
        help="what a model needs and can reach on an accelerator that is not there",
        description="Compiles prefill, pruning and decoding of a full-size model for a chip, which need not be there,"
        " without its weights, and shows memory, kernels, copies and the ceiling that the bandwidth sets.",
    )
    compilation.add_arguments(command, _density)
    command.set_defaults(run=compilation.run)

    for name, module, summary in (
        ("bench", runner, "what pruning gains on this machine, beside what its memory bandwidth allows"),
        ("eval", evaluation, "what pruning costs in quality: divergence, perplexity or ROUGE on your own texts"),
        ("flocking", flocking, "the paper's figures of why pruning works, for your own model and texts"),
        ("prior", general_text, "measure what a model's neurons do in general text, which helps to choose among them"),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)

    commands.add_parser(LM_EVAL, help="lm-evaluation-harness with the model griffin_jax; takes its arguments")
    return parser


def _lm_eval(arguments: Sequence[str]) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("lm-evaluation-harness is not installed: pip install 'griffin-jax[lm-eval]'")
    from griffin_jax.evaluation import lm_eval

    lm_eval.run(arguments)


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    add_dtype_argument(parser)
    add_mesh_arguments(parser)

    prompt = parser.add_argument_group("prompt (several make one batch)")
    prompt.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="the prompt")
    prompt.add_argument(
        "--prompt-file",
        metavar="FILE",
        action="append",
        default=[],
        help="a file that holds the prompt; - is stdin",
    )
    prompt.add_argument("--chat", action="store_true", help="the prompt is a user's message to a chat model")

    pruning = parser.add_argument_group("pruning")
    pruning.add_argument(
        "--density",
        type=_density,
        default=0.5,
        help="share of feed-forward neurons kept, in (0, 1]; 1 is the dense model; or one for each layer,"
        " separated by commas (default: %(default)s)",
    )
    pruning.add_argument(
        "--method", choices=get_args(Method), default="topk", help="how they are chosen (default: topk)"
    )
    pruning.add_argument("--shared", action="store_true", help="one set of neurons for the whole batch")
    pruning.add_argument(
        "--round-to", type=int, default=1, metavar="N", help="round kept neurons up to a multiple of N"
    )
    pruning.add_argument(
        "--groups", type=int, metavar="M",
        help="of M equal ranges of neurons, each keeps as many of its best (default: as many as the devices that --mesh"
        " divides the model among, which then exchange no rows; 1 keeps the best of all, as one device does)",
    )  # fmt: skip
    pruning.add_argument("--experts", metavar="FILE", help="keep the neurons saved in FILE, whatever the density")
    pruning.add_argument("--save-experts", metavar="FILE", help="save the kept neurons")
    pruning.add_argument(
        "--quality", choices=get_args(Quality), default=OPTIONS["quality"],
        help="best: the same as --budgets --reconstruct, with the --prior (by default the file beside the model)",
    )  # fmt: skip
    pruning.add_argument(
        "--prior", metavar="FILE", help="choose also by general text: what griffin-jax prior measured for this model"
    )
    pruning.add_argument(
        "--budgets", action="store_true", help="each layer keeps a share of its own, which the prior found best"
    )
    pruning.add_argument(
        "--prior-weight", type=float, default=DEFAULT_WEIGHT, metavar="W",
        help="of the prior, in [0, 1] (default: %(default)s)",
    )  # fmt: skip
    pruning.add_argument(
        "--reconstruct", type=int, nargs="?", const=True, default=False, metavar="ROWS",
        help=f"refit the kept neurons to what the prompt had from all of them, at ROWS of its tokens"
        f" (default: {DEFAULT_ROWS})",
    )  # fmt: skip
    pruning.add_argument(
        "--refresh-every", type=int, metavar="N",
        help="after every N tokens read them with the full model, and choose the neurons to keep anew",
    )  # fmt: skip
    pruning.add_argument(
        "--speculative", type=int, nargs="?", const=True, default=False, metavar="DRAFTS",
        help=f"answer as the full model does, which decides about DRAFTS tokens of the pruned one at a time"
        f" (default: {DEFAULT_DRAFTS})",
    )  # fmt: skip

    answer = parser.add_argument_group("answer")
    answer.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: %(default)s)"
    )
    answer.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the most probable token (default: 0)"
    )
    answer.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    answer.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens that hold probability P")
    answer.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens of at least P times the largest probability"
    )
    answer.add_argument("--seed", type=int, default=0, help="the same seed gives the same answer (default: 0)")
    answer.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    answer.add_argument("--ignore-eos", action="store_true", help="go on behind the end-of-text token")

    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="print the text while it is written")
    output.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object as the last line: text, tokens, prompt_tokens and finished (lists if there are"
        " several prompts), density and method (null with --experts), kept, refreshes, drafting"
        " (null without --speculative), seconds, decode_tokens_per_second",
    )


def _density(text: str) -> float | Sequence[float]:
    try:
        values = tuple(float(value) for value in text.split(","))
        return GriffinConfig(values[0] if len(values) == 1 else values).density
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _generate(options: argparse.Namespace) -> None:
    prompts: list[Prompt] = [*options.prompt, *map(_read_prompt, options.prompt_file)]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompt-file FILE")
    if options.stream and len(prompts) > 1:
        raise ValueError(f"--stream shows one answer as it is written, there are {len(prompts)} prompts")
    settings: dict[str, Any] = {name: value for name, value in vars(options).items() if name in OPTIONS}
    settings["experts"] = ExpertNeurons.load(options.experts) if options.experts else None
    if options.quality == "best":
        settings["prior"] = general_text.load_for_best(options.model, options.prior)
    else:
        settings["prior"] = Prior.load(options.prior) if options.prior else None
    check_options(**settings)
    if options.save_experts:
        if options.density == 1 and not options.experts:
            raise ValueError("--save-experts: at density 1 nothing is pruned, so there are no experts to save")
        if not Path(options.save_experts).absolute().parent.is_dir():
            raise FileNotFoundError(f"--save-experts: there is no folder {Path(options.save_experts).parent}")

    mesh = chosen_mesh(options)
    same = {name: value for name, value in vars(options).items() if name not in ("distributed", "run")}
    distributed.check_same("a prompt or an option", (prompts, same))
    start = time.perf_counter()
    llm = load(options.model, options.dtype, allow_pickle=options.allow_pickle, mesh=mesh)
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
                print(text)
        if distributed.is_first():
            print(_summary(generation, llm, seconds), file=sys.stderr)
    if options.save_experts and generation.experts is not None:
        generation.experts.save(options.save_experts)


def _streamed(llm: LLM, prompts: Sequence[Prompt], settings: dict[str, Any]) -> Generation:
    stream = llm.stream(prompts, **settings)
    while True:
        try:
            print(next(stream)[0], end="", flush=True)
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
    rate, drafting = generation.decode_tokens_per_second, generation.drafting
    return {
        **fields,
        "model": options.model,
        "density": None if options.experts else options.density,
        "method": None if options.experts else options.method,
        "kept": generation.kept,
        "refreshes": generation.refreshes,
        "drafting": None
        if drafting is None
        else {
            "passes": int(drafting.passes),
            "drafted": int(drafting.drafted.sum()),
            "accepted": int(drafting.accepted.sum()),
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
        speed += f"; {drafting.accepted.sum():,} of {drafting.drafted.sum():,} drafts accepted"
        speed += f" in {drafting.passes:,} passes of the full model"
    times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    return (
        f"[{sum(generation.prompt_tokens)} prompt tokens, {new} new; {kept:,} of {neurons:,} neurons kept;"
        f" {times}{speed}]"
    )


def _info(options: argparse.Namespace) -> None:
    source = loading.open_source(options.model, options.allow_pickle)
    config = source.config
    kept = GriffinConfig(options.density).kept([config.ff_width] * config.num_layers)
    total = sum(math.prod(shape) for shape in source.shapes.values())
    neuron_major = tuple(f".ff.{name}" for name in NEURON_MAJOR)
    ff = sum(math.prod(shape) for path, shape in source.shapes.items() if path.endswith(neuron_major))
    active = total - ff + ff * sum(kept) // (config.ff_width * config.num_layers)
    facts = {
        "model": options.model,
        **config.to_json(),
        "parameters": total,
        "ff_parameters": ff,
        "density": options.density,
        "kept": kept,
        "active_parameters": active,
    }
    if isinstance(source, NativeCheckpoint):
        facts["source"] = {"name": source.converted_from, "sha256": source.hashes}
    if options.json:
        print(json.dumps(facts))
        return
    print(f"{options.model}: {config.family}, {total / 1e6:,.1f} M parameters")
    print(f"  {config.num_layers} layers, width {config.width}, context {config.max_positions:,} tokens")
    print(f"  attention: {config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values")
    print(f"  feed-forward: {config.ff_width} neurons, {'gated ' if config.gated else ''}{config.activation}", end="")
    print(f", {ff / total:.0%} of the parameters")
    print(f"  vocabulary: {config.vocab_size:,}, head {'tied' if config.tied_head else 'untied'}")
    widths = str(kept[0]) if len(set(kept)) == 1 else f"{min(kept)} to {max(kept)}"
    print(f"  at density {options.density}: {widths} neurons a layer, {active / 1e6:,.1f} M parameters active")
    if isinstance(source, NativeCheckpoint):
        print(f"  weights in {source.dtype.name}, from {source.converted_from}")
        for file, digest in source.hashes.items():
            print(f"    sha256 {digest}  {file}")


if __name__ == "__main__":
    sys.exit(main())
