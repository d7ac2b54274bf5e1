"""`griffin-jax eval solve`: how many problems are solved."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from griffin_jax.cli.evaluate.arguments import add_drafters, add_model, add_output, add_prior, add_qualities, add_sample
from griffin_jax.cli.evaluate.comparisons import bytes_per_token, check_formats, choose_formats
from griffin_jax.cli.evaluate.running import Evaluation
from griffin_jax.cli.evaluate.texts import too_long
from griffin_jax.cli.options import add_options
from griffin_jax.evaluation import front, problems, report, solve
from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.grid import DEFAULTS, Variant
from griffin_jax.evaluation.journal import Journal
from griffin_jax.evaluation.problems import COLUMNS, HUMANEVAL, Problem
from griffin_jax.evaluation.samples import Skipped, read_jsonl
from griffin_jax.evaluation.sandbox import Limits, check_sandbox
from griffin_jax.extensions.config import Extensions
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.llm.llm import LLM
from griffin_jax.llm.memory import Needs
from griffin_jax.utils.options import whole


def add(kinds: Any) -> None:
    """Declare the evaluation."""
    kind = kinds.add_parser(
        "solve",
        help="how many problems are solved: HumanEval's functions, GSM8K's numbers",
        description="Every problem is put to the model as a user's message and answered greedily. An answer is right if"
        " the function that was asked for passes its tests (pass@1), or if the final number is right. The dense model"
        " is compared with models of each density in each format of the weights. A later run may add densities,"
        " qualities, formats and problems: answers that are in the output folder already are kept.",
    )
    kind.add_argument(
        "file", metavar="FILE", type=Path,
        help="JSONL file (UTF-8) with one problem per line, in the columns "
        f"{'; '.join(', '.join(columns) + ' with --format ' + name for name, columns in COLUMNS.items())}",
    )  # fmt: skip
    kind.add_argument("--format", choices=COLUMNS, required=True, help="benchmark whose columns the file has")
    kind.add_argument(
        "--run-code", action="store_true",
        help=f"allow running the programs that the model writes, as {HUMANEVAL} needs. They run in processes with"
        " limits, and without network where the system allows that; a container is safer",
    )  # fmt: skip
    limits = Limits()
    kind.add_argument(
        "--seconds", type=int, metavar="N", default=limits.seconds,
        help="processor time that a program may use, in seconds (default: %(default)s)",
    )  # fmt: skip
    kind.add_argument(
        "--megabytes", type=int, metavar="N", default=limits.megabytes,
        help="memory that a program may use, in megabytes (default: %(default)s)",
    )  # fmt: skip
    kind.add_argument(
        "--new-tokens", type=int, metavar="N", default=512,
        help="tokens of an answer, at most (default: %(default)s)",
    )  # fmt: skip
    add_model(kind, weights=False)
    what = kind.add_argument_group("what is compared")
    what.add_argument(
        "--weights", dest="formats", metavar="FORMAT",
        help="formats of the weight matrices to compare with the model's own, separated by commas, such as"
        " int8,int4:64. The number after @ is a share of the kept neurons: int8+int4@0.25 reads the quarter that the"
        " prompt needs most in int8, and the others in int4. Without a share, as in int8+int4, the density counts bytes"
        " of int8, which pay for more neurons in int4",
    )  # fmt: skip
    add_options(
        what, GriffinConfig, "density", type=str, default="0.75,0.5", metavar="D",
        help="shares of feed-forward neurons to keep, separated by commas",
    )  # fmt: skip
    add_qualities(what)
    add_drafters(what, "the answers")
    add_sample(what, size=1)
    add_prior(kind, ", used for all formats")
    add_output(kind)
    kind.set_defaults(
        prepare=prepare, choose=choose, check=check,
        weights=None, baselines=(), refresh_every=DEFAULTS.refresh_every,
    )  # fmt: skip


def choose(options: argparse.Namespace) -> None:
    """Sets the methods, the prior, the formats and the limits of the options, as far as that needs no model.

    Raises:
        FileNotFoundError: the prior of quality best does not exist.
        ValueError: a quality, a format or a drafter is unknown, a number is too small, or programs would have to run
            but may not or cannot.
    """
    options.limits = Limits(options.seconds, options.megabytes)
    whole("--new-tokens", options.new_tokens, 1)
    if options.format == HUMANEVAL:
        if not options.run_code:
            raise ValueError(f"--format {HUMANEVAL} runs programs that the model writes: allow it with --run-code")
        check_sandbox(options.limits)
    options.reference = None
    choose_formats(options)


def check(options: argparse.Namespace, needs: Needs, variants: Sequence[Variant], extensions: Extensions) -> None:
    """Puts the model's own format first, and raises `ValueError` unless this model can have the other formats."""
    own = needs.precision.weights
    options.formats = list(dict.fromkeys([own, *options.formats]))
    if own.quantised and any(front.fine_format(weights) != own for weights in options.formats):
        raise ValueError(f"formats are compared with floating weights, and {options.model} holds {own}")
    check_formats(options, needs, variants, extensions)


def prepare(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    asked = dict(itertools.islice(_problems(options, llm, skipped), options.limit))
    items, decided = [item for item, _ in asked.values()], {name: problem for name, (_, problem) in asked.items()}
    slots = max((len(item.prompt) for item in items), default=0) + options.new_tokens
    drafted = front.pairs(options.formats, options.drafters)

    def compare(journal: Journal) -> dict[str, Any]:
        scores = solve.solve(
            llm, items, decided, variants, options.formats, journal, new=options.new_tokens, size=options.batch,
            seed=options.seed, extensions=extensions,
        )  # fmt: skip
        answers = solve.solve_drafted(llm, items, decided, drafted, journal, new=options.new_tokens)
        return {"scores": scores, "drafts": answers}

    def figures(found: dict[str, Any]) -> report.Figures:
        of_pairs = {}
        for pair in drafted:
            answers = found["drafts"][front.drafted_name(*pair)]
            # The first token of an answer needs no step.
            written = max(1, sum(answer["tokens"] - 1 for answer in answers.values()))
            read = front.drafted_bytes(llm.config, llm.model.dtype, *pair, slots, written, answers.values())
            of_pairs[pair] = answers, read
        sizes = bytes_per_token(options, llm, variants, extensions, slots)
        return solve.figures(found["scores"], variants, options.qualities, sizes, options.seed, of_pairs)

    settings = {
        "format": options.format,
        "new": options.new_tokens,
        "weights": [str(weights) for weights in options.formats],
        "limits": dataclasses.asdict(options.limits) if options.format == HUMANEVAL else None,
    }
    return Evaluation(items, settings, compare, figures, solve.table, solve.plot, grows=True)


def _problems(options: argparse.Namespace, llm: LLM, skipped: Skipped) -> Iterator[tuple[str, tuple[Item, Problem]]]:
    """Yields the name of every problem, its prompt as an item, and the problem, which decides about answers."""
    assert llm.tokenizer is not None
    for record in read_jsonl(options.file, COLUMNS[options.format], skipped):
        try:
            if options.format == HUMANEVAL:
                prompt, test, name = record.texts
                problem = problems.humaneval(prompt, test, name, options.limits)
            else:
                question, answer = record.texts
                problem = problems.gsm8k(question, answer)
        except ValueError as error:
            skipped.add(str(error), record.name)
            continue
        tokens = llm.tokenizer.chat(problem.question)
        if len(tokens) + options.new_tokens > llm.config.max_positions:
            skipped.add(too_long(options, llm), record.name)
        else:
            yield record.name, (Item(record.name, tokens), problem)
