"""`griffin-jax eval`: what pruning costs in quality."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
from jax.sharding import AbstractMesh, Mesh

from griffin_jax import __version__
from griffin_jax.adapters.healing import Healing
from griffin_jax.adapters.peft import WEIGHTS
from griffin_jax.cli.options import (
    add_batch_argument,
    add_dtype_argument,
    add_excerpt_arguments,
    add_mesh_arguments,
    add_model_argument,
    add_options,
    check_batch,
    check_files,
    check_folder,
    check_output,
    check_plot,
    chosen_batch,
    chosen_mesh,
    chosen_needs,
    load_reader,
    numbers,
    read_options,
)
from griffin_jax.evaluation import drafts, front, front_report, groups, problems, promise, report, solve, tasks
from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.factored import Factored, check_comparable
from griffin_jax.evaluation.grid import (
    BASELINES,
    BUDGETS,
    CALIBRATION,
    DEFAULTS,
    DENSE,
    HEALING,
    MEASURED,
    METHODS,
    PRIOR,
    RECONSTRUCTION,
    REFRESH,
    STEPS,
    Variant,
    grid,
    rows_of,
)
from griffin_jax.evaluation.journal import Journal, open_journal
from griffin_jax.evaluation.problems import COLUMNS, HUMANEVAL, Problem
from griffin_jax.evaluation.prompts import SENTENCES, STOP, summarization_prompt
from griffin_jax.evaluation.samples import (
    Skipped,
    as_json,
    excerpt,
    nothing_left,
    read_jsonl,
    read_texts,
    sha256_of_files,
)
from griffin_jax.evaluation.sandbox import Limits, check_sandbox
from griffin_jax.extensions.config import Extensions, check_quality
from griffin_jax.extensions.drafter import draft_format
from griffin_jax.extensions.mixed import MixedFormat
from griffin_jax.extensions.prior import Prior, check_fusion, load_for_best, prior_path
from griffin_jax.extensions.promise import MARGIN, SHORTEST, allowed_densities, trial_tokens
from griffin_jax.extensions.reconstruction import DEFAULT_ROWS
from griffin_jax.extensions.speculative import MOST_DRAFTS, MOST_WITH_COPIES, most_drafts
from griffin_jax.factor.losses import Oracle
from griffin_jax.griffin.config import GriffinConfig, check_density
from griffin_jax.llm.llm import LLM, load
from griffin_jax.llm.memory import Needs, Parts, needs_of
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.parallel.distributed import is_first
from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size, mesh_of
from griffin_jax.utils.options import whole
from griffin_jax.utils.wholefile import write_text

FORMAT = "griffin_jax eval 1"
"""What results.json calls its format."""

QUANTISED = ("int8", "int4")
"""Formats that stand next to a model's own where none are named."""

WRITTEN = ("summarize", "solve")
"""Evaluations of answers to whole prompts."""

COMPARED = ("rows", "weights")
"""Settings that scores do not depend on where those of each variant and format are by themselves."""

RESULTS, TABLE = "results.json", "table.txt"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A task that is ready to run.

    Attributes:
        items: the texts.
        settings: what the scores depend on besides model, texts and variants.
        run: goes through the texts.
        figures: adds up what `run` returned.
        tabulate: for people.
        plot: draws a PNG with a title.
        grows: whether scores of other variants and formats may join those that are there.
    """

    items: Sequence[Item]
    settings: Mapping[str, Any]
    run: Callable[[Journal], dict[str, Any]]
    figures: Callable[[dict[str, Any]], report.Figures]
    tabulate: Callable[[report.Figures], str]
    plot: Callable[[report.Figures, str, Path], None]
    grows: bool = False


DESCRIPTION = """What pruning costs, on a user's own model and texts.

Every text is answered or scored by the dense model and, at each density, by GRIFFIN and by what stands next to it: the
oracle, which keeps the best neurons by the statistic of the answer itself, and magnitude and random pruning, which do
not look at the prompt. Figures are means over texts with 95% bootstrap intervals.

The scores of each text are written to the output folder at once: the same command goes on after an interruption. At the
end, results.json and table.txt are next to them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the evaluations."""
    # What sets and checks more options of a task: before the model is looked at, and then.
    parser.set_defaults(choose=None, check=None)
    kinds = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    kind = kinds.add_parser(
        "divergence",
        help="KL, top-1 agreement and perplexity against the dense model",
        description="The first tokens of each text are read densely, those that follow are scored by the pruned models:"
        " what really follows, and what the dense model itself would write there.",
    )
    _add_text_file(kind, "text")
    _add_lengths(kind)
    _add_reference(kind)
    _add_common(kind, size=4)
    others = kind.add_argument_group("factored models")
    others.add_argument(
        "--factored", metavar="FOLDER", nargs="+", type=Path, default=[],
        help="also score these, which griffin-jax factorize made of the model; all are held next to it",
    )  # fmt: skip
    others.add_argument(
        "--inside", metavar="D", type=str, default="",
        help="shares of each expert's neurons that GRIFFIN keeps in them, separated by commas (default: none)",
    )  # fmt: skip
    others.add_argument(
        "--oracle-routing", metavar="O", choices=get_args(Oracle), nargs="+", default=[],
        help=f"also with the best experts for each token instead of the router's, of {', '.join(get_args(Oracle))}; for"
        " models whose experts are not trained",
    )  # fmt: skip
    kind.set_defaults(prepare=_divergence)

    kind = kinds.add_parser(
        "front",
        help="KL against bytes read per token: is it better to quantise or to prune?",
        description="The first tokens of each text are read densely, those that follow are scored by models whose"
        " weights are stored in each of several formats and pruned to each of several densities. All are compared with"
        " the dense model in its own format. A row is on the front if no other one reads less and is nearer to it.",
    )
    _add_text_file(kind, "text")
    _add_lengths(kind)
    _add_reference(kind)
    _add_model(kind, weights=False)
    what = kind.add_argument_group("what is compared")
    what.add_argument(
        "--weights", dest="formats", metavar="FORMAT",
        help="formats of the matrices, separated by commas, such as float32,int8,int4:64; in int8+int4@0.25 a quarter"
        " of the kept neurons, those that the prompt needs most, have rows in int8, and the others in int4; with"
        " int8+int4 the density counts bytes of int8, which pay for more neurons in int4 (default: the model's own, and"
        f" {', '.join(QUANTISED)})",
    )  # fmt: skip
    add_options(
        what, GriffinConfig, "density", type=str, default="1,0.75,0.5,0.35,0.25", metavar="D",
        help="separated by commas",
    )  # fmt: skip
    _add_qualities(what)
    _add_drafters(what, "its own greedy continuation")
    _add_sample(what, size=4)
    _add_prior(kind, ", for all formats of it")
    _add_output(kind)
    kind.set_defaults(
        prepare=_front, choose=_choose_front, check=_check_formats,
        weights=None, baselines=(), refresh_every=DEFAULTS.refresh_every,
    )  # fmt: skip

    kind = kinds.add_parser(
        "drafts",
        help="speculative decoding: how many drafts are accepted, and the bytes read for each token",
        description="The first tokens of each text are read densely and continued greedily: by the dense model, and by"
        " speculative decoding with drafters of several formats and densities. All answers are the dense model's; shown"
        " is what they read, and how long they took, next to dense decoding.",
    )
    _add_text_file(kind, "text")
    _add_lengths(kind, "tokens of each answer")
    _add_model(kind)
    what = kind.add_argument_group("what is compared")
    what.add_argument(
        "--draft-weights", dest="formats", metavar="FORMAT", default=f"{drafts.OWN},int4",
        help=f"what drafters are stored as, separated by commas: {drafts.OWN} (the model's weights), int8, int4, also"
        " with groups (default: %(default)s)",
    )  # fmt: skip
    add_options(
        what, GriffinConfig, "density", type=str, default="1,0.5", metavar="D", help="of drafters, separated by commas"
    )
    _add_qualities(what)
    what.add_argument(
        "--drafts",
        default=drafts.AUTO,
        metavar="N",
        help=f"of a round, separated by commas; {drafts.AUTO}: as many as are worth it, up to {MOST_DRAFTS}, with"
        f" copies {MOST_WITH_COPIES} (default: %(default)s)",
    )
    what.add_argument(
        "--lookup", dest="copies", action="store_true",
        help="each drafter once more with tokens that are copied from the prompt and the answer, and these alone",
    )  # fmt: skip
    what.add_argument("--limit", type=int, metavar="N", help="use the first N texts that can be used")
    what.add_argument("--seed", type=int, default=0, help="of the intervals (default: %(default)s)")
    _add_prior(kind, healing=False)
    _add_output(kind)
    kind.set_defaults(
        prepare=_drafts, choose=_choose_drafts, check=_check_drafters,
        reference=None, baselines=(), refresh_every=DEFAULTS.refresh_every, batch=1, largest_batch=1, healing=None,
    )  # fmt: skip

    kind = kinds.add_parser(
        "promise",
        help="max_divergence: how often the promise holds on the answer, and at which densities",
        description="The first tokens of each text are read densely; models of a few densities are tried on the last of"
        " them, and then scored on what follows: on the dense model's own greedy answer, and on what really follows."
        " Shown is, for each promise and each file, which densities are taken and how often the promise holds. --limit"
        " counts the texts of each file.",
    )
    kind.add_argument("files", metavar="FILE", nargs="+", type=Path, help="JSONL (UTF-8), one text a line")
    kind.add_argument("--column", default="text", help="that holds the text (default: %(default)s)")
    add_excerpt_arguments(kind)
    _add_lengths(kind)
    _add_model(kind)
    what = kind.add_argument_group("what is compared")
    what.add_argument(
        "--max-divergence", dest="promises", metavar="NATS", default="0.05,0.1,0.2",
        help="what is promised, in nats per token, separated by commas (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--margin", type=float, metavar="Z", default=MARGIN,
        help="standard errors that are added to the mean of a trial; answers have the default (default: %(default)s)",
    )  # fmt: skip
    add_options(what, GriffinConfig, "density", type=str, metavar="D", help="the least that may be taken")
    what.add_argument(
        "--mixed-weights", dest="mixed", metavar="FORMAT",
        help="densities count bytes, which pay for more neurons in FORMAT, such as int4 (default: all neurons have the"
        " model's weights)",
    )  # fmt: skip
    _add_qualities(what)
    _add_sample(what, size=4)
    _add_prior(kind, healing=False)
    _add_output(kind)
    kind.set_defaults(
        prepare=_promise, choose=_choose_promise, check=_check_promise, reference=None, baselines=(),
        refresh_every=DEFAULTS.refresh_every, prompt_tokens=512, healing=None,
    )  # fmt: skip

    kind = kinds.add_parser(
        "groups",
        help="the best neurons of each of several groups against the best of all",
        description="The first tokens of each text are read densely; those that follow are scored by models that keep"
        " the best of all neurons, and the best of each of several equal ranges, as devices that share the model can.",
    )
    _add_text_file(kind, "text")
    _add_lengths(kind)
    kind.add_argument("--groups", metavar="M", default="2,4,8", help="separated by commas (default: %(default)s)")
    _add_common(kind, size=4)
    kind.set_defaults(prepare=_groups, reference=None)

    kind = kinds.add_parser(
        "perplexity",
        help="perplexity against the lengths of prompt and answer",
        description="Texts are cut into windows; the same tokens of each are scored after prompts of every length.",
    )
    kind.add_argument("files", metavar="FILE", nargs="+", type=Path, help="text files (UTF-8)")
    kind.add_argument(
        "--prompt-tokens", metavar="P", default="32,64,128,256,512", help="separated by commas (default: %(default)s)"
    )
    kind.add_argument("--new-tokens", metavar="G", default="32,64,128,256", help="likewise (default: %(default)s)")
    _add_common(kind, size=4)
    kind.set_defaults(prepare=_perplexity)

    kind = kinds.add_parser(
        "summarize",
        help="ROUGE of summaries against references",
        description="Every prompt is answered greedily, and the answer compared with a reference by ROUGE-1, -2 and -L"
        " (F-measures of the package rouge-score). By default the column holds whole prompts; with --format it holds"
        " articles, and prompts are made of them as in the paper: one article with its summary, then the one to"
        " summarise.",
    )
    _add_text_file(kind, "prompt")
    kind.add_argument(
        "--reference", metavar="COLUMN", default="summary", help="with the reference (default: %(default)s)"
    )
    kind.add_argument("--format", choices=SENTENCES, help="make the paper's prompts of articles of this dataset")
    kind.add_argument(
        "--shots", type=int, metavar="N", default=1,
        help="with --format: the first N lines serve as examples and are not scored (default: %(default)s)",
    )  # fmt: skip
    kind.add_argument("--chat", action="store_true", help="prompts are a user's messages to a chat model")
    kind.add_argument(
        "--stop", action="append", metavar="TEXT", help=f"end an answer before this; may be repeated (default: {STOP})"
    )
    kind.add_argument("--stem", action="store_true", help="compare stems of words (Porter) instead of words")
    kind.add_argument(
        "--new-tokens", type=int, metavar="N", default=128, help="of the longest answer (default: %(default)s)"
    )
    # Sequences that keep neurons of their own gain little from being decoded together, and the longest is waited for.
    _add_common(kind, size=1)
    kind.set_defaults(prepare=_summarize)

    kind = kinds.add_parser(
        "solve",
        help="how many problems are solved: HumanEval's functions, GSM8K's numbers",
        description="Every problem is put to the model as a user's message and answered greedily. Counted are the"
        " answers that are right: by the tests of the function that was asked for (pass@1), or by the final number."
        " Compared is the dense model with models of each density and each format of the weights.",
    )
    kind.add_argument(
        "file", metavar="FILE", type=Path,
        help=f"JSONL (UTF-8), one problem a line, with the columns {'; '.join(map(', '.join, COLUMNS.values()))}",
    )  # fmt: skip
    kind.add_argument("--format", choices=COLUMNS, required=True, help="what the file holds")
    kind.add_argument(
        "--run-code", action="store_true",
        help=f"run programs that the model writes, which {HUMANEVAL} needs: in processes with limits, and without"
        " network where the system lets them; a container is safer",
    )  # fmt: skip
    limits = Limits()
    kind.add_argument(
        "--seconds", type=int, metavar="N", default=limits.seconds,
        help="of processor time for a program (default: %(default)s)",
    )  # fmt: skip
    kind.add_argument(
        "--megabytes", type=int, metavar="N", default=limits.megabytes,
        help="of memory for a program (default: %(default)s)",
    )  # fmt: skip
    kind.add_argument(
        "--new-tokens", type=int, metavar="N", default=512, help="of the longest answer (default: %(default)s)"
    )
    _add_model(kind, weights=False)
    what = kind.add_argument_group("what is compared")
    what.add_argument(
        "--weights", dest="formats", metavar="FORMAT",
        help="formats of the matrices beside the model's own, separated by commas, such as int8,int4:64; of int8+int4 a"
        " density counts bytes of int8, which pay for more neurons in int4",
    )  # fmt: skip
    add_options(what, GriffinConfig, "density", type=str, default="0.75,0.5", metavar="D", help="separated by commas")
    _add_qualities(what)
    _add_drafters(what, "its answers")
    _add_sample(what, size=1)
    _add_prior(kind, ", for all formats of it")
    _add_output(kind)
    kind.set_defaults(
        prepare=_solve, choose=_choose_solve, check=_check_stored,
        weights=None, baselines=(), refresh_every=DEFAULTS.refresh_every,
    )  # fmt: skip


def _add_drafters(group: Any, text: str) -> None:
    group.add_argument(
        "--drafters", metavar="FORMAT@D", default="",
        help="also the dense model of each format by speculative decoding, with drafters of a format and a density,"
        f" separated by commas, such as int4@0.5, and the bytes that it reads for a token of {text}; with"
        f" int4@0.5+{drafts.LOOKUP} also copied tokens, with {drafts.LOOKUP} no others (default: none)",
    )  # fmt: skip


def _add_text_file(parser: argparse.ArgumentParser, column: str) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="JSONL (UTF-8), one text a line")
    parser.add_argument("--column", default=column, help=f"that holds the {column} (default: %(default)s)")
    add_excerpt_arguments(parser)


def _add_lengths(parser: argparse.ArgumentParser, new: str = "tokens scored, at most of the dense model's own") -> None:
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="P", default=256, help="tokens read densely (default: %(default)s)"
    )
    parser.add_argument("--new-tokens", type=int, metavar="G", default=128, help=f"{new} (default: %(default)s)")


def _add_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference",
        metavar="COLUMN",
        help="score this column's text after the whole of the other, instead of cutting one text in two",
    )


def _add_model(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    add_model_argument(parser)
    add_dtype_argument(parser, weights=weights)
    add_mesh_arguments(parser)


def _add_qualities(what: Any) -> None:
    what.add_argument(
        "--quality", dest="qualities", metavar="Q",
        help="griffin, best or both, separated by commas (default: griffin, and best if there is a --prior)",
    )  # fmt: skip


def _add_sample(what: Any, size: int) -> None:
    what.add_argument("--limit", type=int, metavar="N", help="use the first N texts that can be used")
    what.add_argument("--seed", type=int, default=0, help="of the draws and intervals (default: %(default)s)")
    add_batch_argument(what, size)


def _add_prior(parser: argparse.ArgumentParser, what_for: str = "", *, healing: bool = True) -> None:
    beyond = parser.add_argument_group("beyond GRIFFIN")
    measured = f"that griffin-jax prior measured for this model{what_for} (default: the file next to it)"
    add_options(beyond, Extensions, "prior", type=Path, help=measured)
    if healing:
        what = "also every quality with the adapter that griffin-jax heal trained for pruned models"
        add_options(beyond, Extensions, "healing", type=Path, help=what)
    _add_beyond(beyond)


def _add_beyond(beyond: Any) -> None:
    add_options(beyond, Extensions, "prior_weight", "ridge", "calibration_weight")
    beyond.add_argument(
        "--rows", type=int, default=DEFAULT_ROWS, metavar="R",
        help=f"tokens of each prompt, at most, that +{RECONSTRUCTION} fits to (default: %(default)s)",
    )  # fmt: skip


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of scores and results (default: eval-TASK in this folder)"
    )
    output.add_argument("--overwrite", action="store_true", help="drop what the folder holds of other settings")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (needs griffin-jax[plot])")
    output.add_argument("--json", action="store_true", help="print results.json as the last line")
    output.add_argument("--json-file", type=Path, metavar="FILE", help="write it to FILE, too")


def _add_common(parser: argparse.ArgumentParser, size: int) -> None:
    _add_model(parser)
    what = parser.add_argument_group("what is compared")
    add_options(what, GriffinConfig, "density", type=str, default="0.5", metavar="D", help="separated by commas")
    what.add_argument(
        "--method", default="topk",
        help=f"of {', '.join(METHODS)}, separated by commas (default: %(default)s). After each may be steps beyond"
        f" GRIFFIN: +{' +'.join(STEPS)}, such as topk,topk+{PRIOR},topk+{PRIOR}+{RECONSTRUCTION}",
    )  # fmt: skip
    what.add_argument(
        "--no-baselines", dest="baselines", action="store_const", const=(), default=BASELINES,
        help=f"leave out {', '.join(BASELINES)}, which stand next to the methods",
    )  # fmt: skip
    _add_sample(what, size)
    beyond = parser.add_argument_group("beyond GRIFFIN")
    measured = f"that griffin-jax prior measured for this model, for +{' +'.join(MEASURED)}"
    add_options(beyond, Extensions, "prior", type=Path, help=measured)
    add_options(
        beyond, Extensions, "healing", type=Path, help=f"that griffin-jax heal trained for this model, for +{HEALING}"
    )
    _add_beyond(beyond)
    refresh = f"tokens, for +{REFRESH}, which scores given continuations only"
    add_options(beyond, Extensions, "refresh_every", default=DEFAULTS.refresh_every, help=refresh)
    _add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Runs one evaluation, from options to files and a table."""
    if options.choose is not None:
        options.choose(options)
    variants = grid(options.method.split(","), numbers("--density", options.density, float), options.baselines)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    extensions = _extensions(options, variants)
    folder = options.output or Path(f"eval-{options.task}")
    check_folder("--output", folder, RESULTS)
    if options.plot is not None:
        check_plot("--plot", options.plot)
    if options.json_file is not None:
        check_output("--json-file", options.json_file)
    if options.task == "summarize":
        tasks.rouge_scorer(options.stem)
    files = options.files if hasattr(options, "files") else [options.file]
    check_files(files, once=options.task == "promise")

    mesh = chosen_mesh(options)
    check_batch(options, mesh)
    wanted, lengths = options.batch, _lengths(options)
    needs = chosen_needs(options, mesh)
    if _has(variants, HEALING):
        extensions = dataclasses.replace(extensions, healing=Healing.load(options.healing, needs.config))
    if options.check is not None:
        options.check(options, needs, variants, extensions)
    options.batch = _batch(options, variants, extensions, needs, lengths, mesh)
    llm = load_reader(options, mesh)
    model = fingerprint(llm.model)
    if extensions.prior is not None:
        extensions.prior.check(model)
    if extensions.healing is not None:
        extensions.healing.check(llm.config, model)
    skipped = Skipped()
    evaluation: Evaluation = options.prepare(options, llm, variants, extensions, skipped)
    skipped.report()
    if not evaluation.items:
        raise nothing_left(skipped, ", ".join(map(str, files)))
    longest = [max(max(map(len, texts)), known) for texts, known in zip(_texts(evaluation.items), lengths, strict=True)]
    if longest != lengths:
        # Only now it is known how long the texts are.
        options.batch = wanted
        options.batch = _batch(options, variants, extensions, needs_of(llm.model), longest, mesh)
    beyond = _beyond_settings(options, variants)
    settings = {
        "task": options.task,
        "model": model,
        "texts": sha256_of_files(files),
        "dtype": str(llm.model.dtype),
        "rows": [variant.name for variant in variants],
        "seed": options.seed,
        **beyond,
        **evaluation.settings,
    }
    known, unused = settings, ()
    if evaluation.grows:
        known = {name: value for name, value in settings.items() if name not in COMPARED}
        unused = (*COMPARED, *beyond)
    journal = open_journal(folder, known, overwrite=options.overwrite, unused=unused)
    scores = evaluation.run(journal)
    figures = evaluation.figures(scores)
    results = {
        "format": FORMAT,
        "griffin_jax": __version__,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "model_name": options.model,
        **settings,
        "files": [str(file) for file in files],
        "used": len(evaluation.items),
        "left_out": as_json(skipped),
        "figures": figures,
    }
    precision = Precision.of(llm.model.dtype, llm.model.weights)
    head = (
        f"{options.model}, {precision}: {len(evaluation.items)} texts, {len(skipped)} left out;"
        " [95% bootstrap intervals over texts]"
    )
    shown = f"{head}\n\n{evaluation.tabulate(figures)}"
    if not is_first():
        return
    write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    write_text(folder / TABLE, shown + "\n")
    print(shown)
    if options.plot is not None:
        title = f"{options.model}, {len(evaluation.items)} texts, bars: 95% intervals"
        evaluation.plot(figures, title, options.plot)
    if options.json_file is not None:
        write_text(options.json_file, json.dumps(results) + "\n")
    if options.json:
        print(json.dumps(results))


def _lengths(options: argparse.Namespace) -> list[int]:
    """Tokens of the longest prompt and of what follows it, as far as the options tell."""
    if options.task == "perplexity":
        return [max(numbers(f"--{name}-tokens", getattr(options, f"{name}_tokens"), int)) for name in ("prompt", "new")]
    return [1 if options.task in WRITTEN or options.reference else options.prompt_tokens, options.new_tokens]


def _texts(items: Sequence[Item]) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    return [item.prompt for item in items], [item.answer for item in items]


def _batch(
    options: argparse.Namespace,
    variants: Sequence[Variant],
    extensions: Extensions,
    needs: Needs,
    lengths: Sequence[int],
    mesh: Mesh | None,
) -> int:
    """Texts at a time, that fit into memory."""
    prompt, new = (max(1, min(length, needs.config.max_positions)) for length in lengths)
    rows, prior = rows_of(variants, extensions), extensions.prior
    calibration = prior.rows[0].shape[0] if prior is not None and prior.rows and _has(variants, CALIBRATION) else 0
    density = max((variant.density for variant in variants if variant.method != DENSE), default=1.0)
    kept = GriffinConfig(density).kept(needs.config.neuron_ranges)
    models = len(variants) * (1 + len(options.groups.split(","))) if options.task == "groups" else len(variants)

    def needed(batch: int) -> Parts:
        if options.task in WRITTEN:
            parts = needs.generation(batch, prompt, new, kept, rows=rows, calibration=calibration, repeated=True)
            return parts | _beside(options, needs) if options.task == "solve" else parts
        if options.task == "drafts":
            formats = [weights for weights in options.formats if weights is not None]
            largest = max(formats, key=lambda weights: weights.bits, default=None)
            most = min(max(most_drafts(number, lookup=options.copies) for number in options.drafts), new - 1)
            return needs.generation(
                batch, prompt, new + most, kept, rows=rows, calibration=calibration, drafts=most, drafter=largest
            )
        answers = options.task in ("divergence", "promise")
        parts = needs.scoring(batch, prompt, new, models, rows=rows, calibration=calibration, answers=answers)
        if options.task == "promise" and options.mixed is not None:
            return parts | {"neurons in fewer bits": _coarse_bytes(needs, options.mixed)}
        return parts | _beside(options, needs) if options.task == "front" else parts

    return chosen_batch(options, needed, "--weights of fewer bits or shorter texts", mesh)


def _beside(options: argparse.Namespace, needs: Needs) -> Parts:
    """The bytes of the largest model in another format, next to the one in its own, and of the largest drafter."""

    def held(fine: WeightFormat) -> int:
        bits = 0 if fine == needs.precision.weights else needs.in_memory(_sizes(needs, fine).local, fine)
        mixed = [each for each in options.formats if isinstance(each, MixedFormat) and each.fine == fine]
        rows = [_coarse_bytes(needs, each) for each in mixed]
        return bits + (sum(rows) if options.task == "solve" else max(rows, default=0))

    parts = {"weights in another format": max(map(held, map(front.fine_format, options.formats)))}
    drafters = [needs.drafter(drafter.weights) for drafter in options.drafters if drafter.weights is not None]
    return parts | ({"drafter": max(drafters)} if drafters else {})


def _coarse_bytes(needs: Needs, mixed: MixedFormat) -> int:
    """Bytes of all neurons in the second of two formats."""
    return needs.in_memory(_sizes(needs, mixed.coarse).ff(None), mixed.coarse)


def _sizes(needs: Needs, weights: WeightFormat) -> Sizes:
    devices = axis_size(needs.mesh, MODEL_AXIS)
    return Sizes(needs.config, 1, 1, Precision.of(needs.precision.dtype, weights), shared=True, devices=devices)


def _has(variants: Sequence[Variant], *steps: str) -> bool:
    return any(step in variant.steps for variant in variants for step in steps)


def _extensions(options: argparse.Namespace, variants: Sequence[Variant]) -> Extensions:
    """What the variants' steps take, checked before the model is loaded."""
    check_fusion("topk", options.prior_weight)
    for name, value in (("--rows", options.rows), ("--refresh-every", options.refresh_every)):
        whole(name, value, 1)
    if options.task == "summarize" and _has(variants, REFRESH):
        raise ValueError(f"+{REFRESH} scores continuations that are given: evaluate divergence or perplexity")
    prior = None
    if _has(variants, *MEASURED):
        if options.prior is None:
            raise ValueError(f"+{' +'.join(MEASURED)} need --prior FILE; griffin-jax prior measures it")
        prior = Prior.load(options.prior)
        if _has(variants, BUDGETS) and not prior.strength:
            raise ValueError(f"{options.prior} has no budgets: {prior.uniform}")
        if _has(variants, CALIBRATION) and not prior.rows:
            raise ValueError(f"{options.prior} has no calibration rows; measure it with griffin-jax prior --rows")
    if _has(variants, HEALING) and options.healing is None:
        raise ValueError(f"+{HEALING} needs --healing FOLDER; griffin-jax heal trains it")
    return read_options(options, Extensions, prior=prior, refit=options.rows, healing=None)


def _beyond_settings(options: argparse.Namespace, variants: Sequence[Variant]) -> dict[str, Any]:
    """What scores depend on beyond GRIFFIN; None where no variant does."""
    uses_prior, uses_rows = _has(variants, *MEASURED), _has(variants, RECONSTRUCTION)
    return {
        "prior": sha256_of_files([options.prior]) if uses_prior else None,
        "prior_weight": options.prior_weight if _has(variants, PRIOR) else None,
        "reconstruction_rows": options.rows if uses_rows else None,
        "ridge": options.ridge if uses_rows else None,
        "calibration_weight": options.calibration_weight if _has(variants, CALIBRATION) else None,
        "refresh_every": options.refresh_every if _has(variants, REFRESH) else None,
        **({"healing": sha256_of_files([options.healing / WEIGHTS])} if _has(variants, HEALING) else {}),
    }


def _continued(options: argparse.Namespace, llm: LLM, skipped: Skipped) -> tuple[list[Item], dict[str, Any]]:
    """Texts in which the prompt is followed by what is scored, and the settings that make them."""
    prompt, new = options.prompt_tokens, options.new_tokens
    _check_lengths(llm, 1 if options.reference else prompt, new)
    columns = [options.column, *([options.reference] if options.reference else [])]
    items = list(itertools.islice(_divergence_items(options, llm, options.file, columns, skipped), options.limit))
    settings = {"columns": columns, "after": options.after, "before": options.before, "prompt": prompt, "new": new}
    return items, settings


def _divergence(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    items, settings = _continued(options, llm, skipped)
    others = _factored(options, llm)
    every = (*variants, *(variant for other in others for variant in other.variants))
    if others:
        settings |= {"factored": {other.name: fingerprint(other.model) for other in others}}
        settings |= {"rows": [variant.name for variant in every]}

    def tabulate(figures: report.Figures) -> str:
        return "\n\n".join(
            report.table(f"{title}:", [f for f in figures if f["continuation"] == kind], report.FORCED)
            for kind, title in report.CONTINUATIONS.items()
        )

    def plot(figures: report.Figures, title: str, file: Path) -> None:
        panels = {
            name: [entry for entry in figures if entry["continuation"] == kind]
            for kind, name in report.CONTINUATIONS.items()
        }
        report.plot_by_density(panels, report.FORCED, title, file)

    return Evaluation(
        items,
        settings,
        lambda journal: tasks.divergence(
            llm,
            items,
            variants,
            journal,
            new=options.new_tokens,
            size=options.batch,
            seed=options.seed,
            extensions=extensions,
            factored=others,
        ),
        lambda scores: report.divergence_figures(scores, every, options.seed),
        tabulate,
        plot,
    )


def _factored(options: argparse.Namespace, llm: LLM) -> list[Factored]:
    """The factored models of the options.

    Raises:
        ValueError: one is not of this model, or two have the same name.
    """
    densities = numbers("--inside", options.inside, float) if options.inside else []
    for density in densities:
        check_density(density)
    names = [folder.name for folder in options.factored]
    if len(set(names)) < len(names):
        raise ValueError(f"folders of --factored have the same name: {', '.join(names)}")
    found, mesh = [], mesh_of(llm.model.embedding[...])
    assert not isinstance(mesh, AbstractMesh)
    for name, folder in zip(names, options.factored, strict=True):
        other = load(folder, options.dtype, mesh=mesh)
        check_comparable(llm.config, other.config, str(folder))
        found.append(Factored(name, other.model, densities, options.oracle_routing))
    return found


def _choose_front(options: argparse.Namespace) -> None:
    """Sets the methods, the prior and the formats of the options, as far as no model is needed for it.

    Raises:
        FileNotFoundError: quality best has no prior.
        ValueError: there is no such quality or format.
    """
    _choose_qualities(options)
    options.formats = [MixedFormat.parse(name) for name in options.formats.split(",")] if options.formats else []
    _choose_drafters(options)


def _choose_drafters(options: argparse.Namespace) -> None:
    """Sets the drafters, and raises `ValueError` if there is no such one, or none can draft an answer."""
    names = options.drafters.split(",") if options.drafters else []
    options.drafters = list(dict.fromkeys(map(drafts.Drafter.parse, names)))
    if names and options.new_tokens < 2:
        raise ValueError(f"--new-tokens must be 2 at least, so that something is drafted, got {options.new_tokens}")


def _choose_drafts(options: argparse.Namespace) -> None:
    """Likewise, and the numbers of drafts, True for as many as are worth it.

    Raises:
        FileNotFoundError: quality best has no prior.
        ValueError: there is no such quality or format, or a number of drafts is neither auto nor a number from 1.
    """
    _choose_qualities(options)
    names = [name.strip() for name in options.formats.split(",")]
    options.formats = list(dict.fromkeys(None if name == drafts.OWN else draft_format(name) for name in names))
    given = [text.strip() for text in options.drafts.split(",")]
    auto, fixed = drafts.AUTO in given, ",".join(text for text in given if text != drafts.AUTO)
    counted = numbers("--drafts", fixed, int) if fixed or not auto else []
    options.drafts = [True] * auto + [whole("--drafts", number, 1) for number in counted]


def _choose_qualities(options: argparse.Namespace) -> None:
    """Sets the methods and the prior of the options.

    Raises:
        FileNotFoundError: quality best has no prior.
        ValueError: there is no such quality.
    """
    named = options.qualities
    if named is None:
        found = options.prior is not None or prior_path(options.model).is_file()
        named = "griffin,best" if found else "griffin"
    methods = {}
    for quality in named.split(","):
        check_quality(quality)
        methods[quality] = "topk"
        if quality == "best":
            prior = load_for_best(options.model, options.prior)
            options.prior = options.prior or prior_path(options.model)
            has = {PRIOR: True, BUDGETS: prior.strength, RECONSTRUCTION: True, CALIBRATION: prior.rows}
            methods[quality] = "+".join(["topk", *(step for step, there in has.items() if there)])
    if options.healing is not None:
        methods |= {f"{quality}+heal": f"{method}+{HEALING}" for quality, method in methods.items()}
    options.method = ",".join(methods.values())
    options.qualities = {DENSE: "-"} | {method: quality for quality, method in methods.items()}


def _check_drafters(
    options: argparse.Namespace, needs: Needs, variants: Sequence[Variant], extensions: Extensions
) -> None:
    """Raises `ValueError` unless drafters of this model can have all formats."""
    for weights in filter(None, options.formats):
        weights.check(needs.config.width, needs.config.embedding_width)


def _check_formats(
    options: argparse.Namespace, needs: Needs, variants: Sequence[Variant], extensions: Extensions
) -> None:
    """Sets the formats if none are named, and raises `ValueError` unless this model can have all of them."""
    own = needs.precision.weights
    if own.quantised:
        raise ValueError(f"formats are compared with floating weights, and {options.model} holds {own}")
    options.formats = list(dict.fromkeys(options.formats or [own, *map(MixedFormat.parse, QUANTISED)]))
    for weights in options.formats:
        weights.check(needs.config.width, needs.config.embedding_width)
    front.check_variants(needs.config, variants, options.formats, extensions)
    _check_pairs(options, needs)


def _check_pairs(options: argparse.Namespace, needs: Needs) -> None:
    """Raises `ValueError` unless this model can have the drafters, and a format has more bits than theirs."""
    for drafter in (each for each in options.drafters if each.weights is not None):
        drafter.weights.check(needs.config.width, needs.config.embedding_width)
    if options.drafters and not front.pairs(options.formats, options.drafters):
        raise ValueError(
            "--drafters have fewer bits than the model they draft for, and no format of --weights has more"
        )


def _front(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    items, settings = _continued(options, llm, skipped)
    slots = max((len(item.prompt) + len(item.answer) for item in items), default=0)
    drafted, new = front.pairs(options.formats, options.drafters), options.new_tokens

    def compare(journal: Journal) -> dict[str, Any]:
        scores = front.compare_formats(
            llm, items, variants, options.formats, journal, new=new, size=options.batch, seed=options.seed,
            extensions=extensions,
        )  # fmt: skip
        return {"scores": scores, "drafts": front.compare_drafted(llm, items, drafted, journal, new=new)}

    def figures(found: dict[str, Any]) -> report.Figures:
        read = {
            pair: front.drafted_bytes(
                llm.config,
                llm.model.dtype,
                *pair,
                slots,
                (new - 1) * len(items),
                found["drafts"][front.drafted_name(*pair)].values(),
            )
            for pair in drafted
        }
        sizes = _bytes_per_token(options, llm, variants, extensions, slots)
        return front.figures(found["scores"], variants, options.qualities, sizes, options.seed, read)

    settings |= {"weights": [str(weights) for weights in options.formats]}
    return Evaluation(items, settings, compare, figures, front_report.table, front_report.plot)


def _bytes_per_token(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, slots: int
) -> dict[tuple[str, Variant], int]:
    """What a token of every format and variant reads, by the format's name."""
    config, dtype = llm.config, llm.model.dtype
    return {
        (str(weights), variant): front.bytes_per_token(config, dtype, weights, slots, variant, extensions)
        for weights, variant in front.compared(options.formats, variants)
    }


def _drafts(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    every = drafts.drafters(options.formats, variants, options.qualities, options.drafts, lookup=options.copies)
    if not every:
        raise ValueError("nothing drafts: give --density below 1, --draft-weights such as int4, or --lookup")
    items, settings = _continued(options, llm, skipped)
    new = options.new_tokens
    # As many as are worth it are fewer in a shorter answer.
    most = max(int(number) for number in options.drafts)
    if new <= most:
        raise ValueError(f"--new-tokens must be more than the {most} of --drafts, got {new}")
    slots = max((len(item.prompt) for item in items), default=0) + new
    return Evaluation(
        items,
        settings | {"drafters": [drafter.name for drafter in every], "weights": str(llm.model.weights)},
        lambda journal: drafts.compare_drafters(llm, items, every, journal, new=new, extensions=extensions),
        lambda scores: drafts.figures(
            scores, every, llm, slots=slots, new=new, seed=options.seed, extensions=extensions
        ),
        drafts.table,
        drafts.plot,
    )


def _choose_promise(options: argparse.Namespace) -> None:
    """Sets the promises, the methods, the prior and the densities of the options.

    Raises:
        FileNotFoundError: quality best has no prior.
        ValueError: there is no such quality, a number is outside its range, the prompts are too short for a trial, or
            two files have the same name.
    """
    options.promises = numbers("--max-divergence", options.promises, float)
    for most in options.promises:
        Extensions(max_divergence=most, mixed_weights=options.mixed)
    if not 0 <= options.margin < math.inf:
        raise ValueError(f"--margin must be at least 0, got {options.margin}")
    _choose_qualities(options)
    (least, *more) = numbers("--density", str(options.density), float)
    if more:
        raise ValueError(f"--density is the least one that may be taken, give one, got {options.density}")
    check_density(least)
    options.density = ",".join(map(str, allowed_densities(least)))
    if not options.density:
        raise ValueError("--density 1 is the dense model; give the least density that may be taken")
    if not trial_tokens(options.prompt_tokens):
        raise ValueError(
            f"prompts of {options.prompt_tokens} tokens are too short for a trial: --prompt-tokens {SHORTEST} or more"
        )
    if len({file.name for file in options.files}) < len(options.files):
        raise ValueError("files are shown by their names, and two have the same")


def _check_promise(
    options: argparse.Namespace, needs: Needs, variants: Sequence[Variant], extensions: Extensions
) -> None:
    """Sets the formats of kept neurons, and raises `ValueError` unless this model can have them."""
    options.mixed = Extensions(mixed_weights=options.mixed).mixed(needs.precision.weights)
    if options.mixed is not None:
        options.mixed.check(needs.config.width, needs.config.embedding_width)
        front.check_variants(needs.config, variants, [options.mixed], extensions)


def _promise(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    prompt, new = options.prompt_tokens, options.new_tokens
    _check_lengths(llm, prompt, new)
    of_files = {
        file.name: list(
            itertools.islice(_divergence_items(options, llm, file, [options.column], skipped), options.limit)
        )
        for file in options.files
    }
    items = [item for found in of_files.values() for item in found]
    kinds = {item.name: kind for kind, found in of_files.items() for item in found}
    trial = trial_tokens(prompt)
    return Evaluation(
        items,
        {
            "column": options.column, "after": options.after, "before": options.before, "prompt": prompt, "new": new,
            "trial": trial, "weights": str(options.mixed or llm.model.weights),
        },
        lambda journal: promise.try_densities(
            llm, items, variants, journal, trial=trial, new=new, size=options.batch, seed=options.seed,
            extensions=extensions, mixed=options.mixed,
        ),
        lambda scores: promise.figures(
            scores, kinds, variants, options.qualities, options.promises, options.seed, options.margin
        ),
        promise.table,
        promise.plot,
    )  # fmt: skip


def _groups(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    if options.method != "topk":
        raise ValueError(f"groups are compared by topk, got --method {options.method}")
    densities = [variant.density for variant in variants if variant.method == "topk"]
    rules = groups.rules(densities, numbers("--groups", options.groups, int), llm.model.config.neuron_ranges)
    prompt, new = options.prompt_tokens, options.new_tokens
    _check_lengths(llm, prompt, new)
    items = list(
        itertools.islice(_divergence_items(options, llm, options.file, [options.column], skipped), options.limit)
    )
    return Evaluation(
        items,
        {
            "column": options.column, "after": options.after, "before": options.before, "prompt": prompt, "new": new,
            "rows": [variant.name for variant in rules],
        },
        lambda journal: groups.compare_groups(
            llm, items, rules, journal, new=new, size=options.batch, seed=options.seed
        ),
        lambda scores: groups.figures(scores, rules, options.seed),
        lambda figures: report.table("what really follows:", figures, groups.METRICS),
        lambda figures, title, file: report.plot_by_density({"": figures}, groups.METRICS, title, file),
    )  # fmt: skip


def _divergence_items(
    options: argparse.Namespace, llm: LLM, file: Path, columns: Sequence[str], skipped: Skipped
) -> Iterator[Item]:
    assert llm.tokenizer is not None
    cut = excerpt(options.after, options.before)
    prompt, new = options.prompt_tokens, options.new_tokens
    for record in read_jsonl(file, columns, skipped):
        tokens = llm.tokenizer.encode(cut(record.texts[0]))
        if options.reference:
            # Encoded together, since words may be cut otherwise where two texts meet.
            whole = llm.tokenizer.encode(cut(record.texts[0]) + record.texts[1])
            item = Item(record.name, tokens, whole[len(tokens) :])
        else:
            item = Item(record.name, tokens[:prompt], tokens[prompt : prompt + new])
        if not item.prompt or (not options.reference and len(tokens) < prompt + new):
            skipped.add(f"shorter than {prompt} + {new} tokens" if not options.reference else "no tokens", record.name)
        elif not item.answer:
            skipped.add("the reference has no tokens of its own", record.name)
        elif len(item.prompt) + max(new, len(item.answer)) > llm.config.max_positions:
            skipped.add(f"longer than the model's context of {llm.config.max_positions} tokens", record.name)
        else:
            yield item


def _perplexity(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    prompts = sorted(numbers("--prompt-tokens", options.prompt_tokens, int))
    news = sorted(numbers("--new-tokens", options.new_tokens, int))
    for length in (prompts[0], news[0]):
        if length < 1:
            raise ValueError(f"lengths are at least 1 token, got {length}")
    _check_lengths(llm, prompts[-1], news[-1])
    items = list(itertools.islice(_windows(options.files, llm, prompts[-1], news[-1], skipped), options.limit))
    return Evaluation(
        items,
        {"prompts": prompts, "new": news},
        lambda journal: tasks.perplexity(
            llm,
            items,
            variants,
            journal,
            prompts=prompts,
            news=news,
            size=options.batch,
            seed=options.seed,
            extensions=extensions,
        ),
        lambda scores: report.perplexity_figures(scores, variants, prompts, news, options.seed),
        lambda figures: report.perplexity_table(figures, prompts, news),
        lambda figures, title, file: report.plot_by_length(figures, prompts, news, title, file),
    )


def _windows(files: Sequence[Path], llm: LLM, prompt: int, new: int, skipped: Skipped) -> Iterator[Item]:
    """Windows of prompt + new tokens, one after the other; what is left at a file's end is too short for one."""
    assert llm.tokenizer is not None
    for name, text in read_texts(files, skipped):
        tokens = llm.tokenizer.encode(text)
        whole = len(tokens) // (prompt + new)
        if not whole:
            skipped.add(f"shorter than a window of {prompt} + {new} tokens", name)
        for number in range(whole):
            window = tokens[number * (prompt + new) : (number + 1) * (prompt + new)]
            yield Item(f"{name}, window {number + 1}", window[:prompt], window[prompt:])


def _summarize(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    if options.new_tokens < 1:
        raise ValueError(f"--new-tokens must be at least 1, got {options.new_tokens}")
    if options.format and options.shots < 0:
        raise ValueError(f"--shots must be at least 0, got {options.shots}")
    stop = [STOP] if options.stop is None else options.stop
    if "" in stop:
        raise ValueError("--stop must not be empty")
    items = list(itertools.islice(_prompts(options, llm, skipped), options.limit))
    settings = {
        "columns": [options.column, options.reference], "after": options.after, "before": options.before,
        "format": options.format, "shots": options.shots if options.format else None, "chat": options.chat,
        "stop": stop, "stem": options.stem, "new": options.new_tokens,
    }  # fmt: skip
    return Evaluation(
        items,
        settings,
        lambda journal: tasks.summarize(
            llm, items, variants, journal,
            new=options.new_tokens, stop=stop, stem=options.stem, size=options.batch, seed=options.seed,
            extensions=extensions,
        ),
        lambda scores: report.summarize_figures(scores, variants, options.seed),
        lambda figures: report.table("ROUGE of greedy answers:", figures, report.ROUGES),
        lambda figures, title, file: report.plot_by_density({"": figures}, report.ROUGES, title, file),
    )  # fmt: skip


def _prompts(options: argparse.Namespace, llm: LLM, skipped: Skipped) -> Iterator[Item]:
    assert llm.tokenizer is not None
    cut = excerpt(options.after, options.before)
    examples: list[tuple[str, str]] = []
    for record in read_jsonl(options.file, [options.column, options.reference], skipped):
        text, reference = cut(record.texts[0]), record.texts[1]
        if not text.strip():
            skipped.add("nothing between --after and --before", record.name)
            continue
        if options.format and len(examples) < options.shots:
            examples.append((text, reference))
            continue
        if options.format:
            text = summarization_prompt(text, examples, options.format)
        tokens = llm.tokenizer.chat(text) if options.chat else llm.tokenizer.encode(text)
        if len(tokens) + options.new_tokens > llm.config.max_positions:
            skipped.add(_too_long(options, llm), record.name)
        else:
            yield Item(record.name, tokens, reference=reference)


def _choose_solve(options: argparse.Namespace) -> None:
    """Sets the methods, the prior, the formats and the limits of the options, as far as no model is needed for it.

    Raises:
        FileNotFoundError: quality best has no prior.
        ValueError: there is no such quality or format, a number is less than 1, or programs are not to be run.
    """
    options.limits = Limits(options.seconds, options.megabytes)
    whole("--new-tokens", options.new_tokens, 1)
    if options.format == HUMANEVAL:
        if not options.run_code:
            raise ValueError(f"--format {HUMANEVAL} runs programs that the model writes: allow it with --run-code")
        check_sandbox(options.limits)
    _choose_qualities(options)
    options.reference = None
    options.formats = [MixedFormat.parse(name) for name in options.formats.split(",")] if options.formats else []
    _choose_drafters(options)


def _check_stored(
    options: argparse.Namespace, needs: Needs, variants: Sequence[Variant], extensions: Extensions
) -> None:
    """Puts the model's own format first, and raises `ValueError` unless this model can have the others."""
    own = needs.precision.weights
    options.formats = list(dict.fromkeys([own, *options.formats]))
    if own.quantised and any(front.fine_format(weights) != own for weights in options.formats):
        raise ValueError(f"formats are compared with floating weights, and {options.model} holds {own}")
    for weights in options.formats:
        weights.check(needs.config.width, needs.config.embedding_width)
    front.check_variants(needs.config, variants, options.formats, extensions)
    _check_pairs(options, needs)


def _solve(
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
        sizes = _bytes_per_token(options, llm, variants, extensions, slots)
        return solve.figures(found["scores"], variants, options.qualities, sizes, options.seed, of_pairs)

    settings = {
        "format": options.format,
        "new": options.new_tokens,
        "weights": [str(weights) for weights in options.formats],
        "limits": dataclasses.asdict(options.limits) if options.format == HUMANEVAL else None,
    }
    return Evaluation(items, settings, compare, figures, solve.table, solve.plot, grows=True)


def _problems(options: argparse.Namespace, llm: LLM, skipped: Skipped) -> Iterator[tuple[str, tuple[Item, Problem]]]:
    """Name, prompt and verdict of every problem."""
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
            skipped.add(_too_long(options, llm), record.name)
        else:
            yield record.name, (Item(record.name, tokens), problem)


def _too_long(options: argparse.Namespace, llm: LLM) -> str:
    return f"prompt and {options.new_tokens} new tokens longer than the model's context of {llm.config.max_positions}"


def _check_lengths(llm: LLM, prompt: int, new: int) -> None:
    if min(prompt, new) < 1:
        raise ValueError(f"--prompt-tokens and --new-tokens must be at least 1, got {prompt} and {new}")
    if prompt + new > llm.config.max_positions:
        raise ValueError(
            f"{prompt} + {new} tokens are more than the model's context of {llm.config.max_positions}; give less of"
            " --prompt-tokens or --new-tokens"
        )
