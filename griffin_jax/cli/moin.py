"""`griffin-jax moin`: train a library of independent adapters, and answer each prompt with one of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin_jax.adapters.adapter import parameters_of
from griffin_jax.adapters.config import AdapterConfig
from griffin_jax.adapters.embedding import Embedder, EmbeddingConfig
from griffin_jax.adapters.library import Library, make_library
from griffin_jax.cli.options import (
    add_dtype_argument,
    add_model_argument,
    add_options,
    check_fits,
    check_output,
    chosen_needs,
    load_reader,
    read_options,
)
from griffin_jax.cli.training import check_length
from griffin_jax.evaluation.general_text import MOST_SKETCHED, measure, windows
from griffin_jax.evaluation.samples import Skipped, nothing_left, read_jsonl, read_texts
from griffin_jax.extensions.reconstruction import DEFAULT_ROWS
from griffin_jax.generation.config import GenerationConfig
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.llm.llm import LLM, Prompt
from griffin_jax.llm.memory import adapter_bytes
from griffin_jax.llm.results import Generation
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.training.config import TrainingConfig
from griffin_jax.utils.messages import printable, shown

if TYPE_CHECKING:
    from griffin_jax.adapters.jobs import Job

DESCRIPTION = """MoIN (arXiv 2410.09687): divides texts into clusters, trains an adapter for each cluster independently
of the others, and answers each prompt with the adapter of the nearest cluster. Run `cluster` first, then
`train`, on any machines and in any order, and then `generate` and `eval`. `cluster` and `train` need extra
packages: pip install '.[moin]'."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands and their arguments."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")

    command = commands.add_parser("cluster", help="divide texts into clusters, and write a library without adapters")
    _add_library(command, "folder to write; must not exist yet")
    _add_texts(command)
    command.add_argument(
        "--clusters", type=int, metavar="N", default=16, help="number of clusters (default: %(default)s)"
    )
    command.add_argument(
        "--random", action="store_true", help="deal texts and prompts out at random, as a baseline for clusters"
    )
    command.add_argument("--seed", type=int, default=0, help="random seed of k-means (default: %(default)s)")
    command.add_argument(
        "--kinds",
        metavar="COLUMN",
        help="column of JSONL files with the kind of each text; kinds are only counted, for each cluster",
    )
    embedding = command.add_argument_group("embedding")
    add_options(embedding, EmbeddingConfig, "layers", "tokens")
    embedding.add_argument(
        "--sentences", metavar="NAME", help="model of sentence-transformers that embeds the texts instead"
    )
    _add_model(command)

    command = commands.add_parser("show", help="show what is in each cluster, and which adapters are trained")
    _add_library(command)

    command = commands.add_parser("train", help="train the adapters that are not finished, or only one of them")
    _add_library(command)
    command.add_argument(
        "--cluster", type=int, metavar="I", help="train only this cluster (default: all, one after the other)"
    )
    command.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        default=1,
        help="number of adapters that are trained together (default: %(default)s)",
    )
    command.add_argument(
        "--save-every",
        type=int,
        metavar="N",
        default=100,
        help="number of updates between two checkpoints (default: %(default)s)",
    )
    add_options(command.add_argument_group("adapter"), AdapterConfig)
    add_options(command.add_argument_group("training"), TrainingConfig)
    _add_model(command)

    command = commands.add_parser("generate", help="answer prompts, each with the adapter of its cluster")
    _add_library(command)
    command.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        required=True,
        help="the text of a prompt; repeat the option to answer several prompts as a batch",
    )
    add_options(command, GriffinConfig, "density")
    add_options(command, GenerationConfig, "chat", "max_new_tokens", "temperature", "seed")
    command.add_argument(
        "--priors",
        action="store_true",
        help="choose neurons also by the prior of the prompt's cluster; prompts are answered one by one",
    )
    _add_model(command)

    command = commands.add_parser("prior", help="measure the prior of each cluster: how neurons behave in its texts")
    _add_library(command)
    command.add_argument(
        "--window",
        metavar="T",
        type=int,
        default=512,
        help="number of tokens of each text, at most (default: %(default)s)",
    )
    command.add_argument(
        "--rows",
        metavar="C",
        type=int,
        default=0,
        help="number of calibration rows of each layer (default: %(default)s)",
    )
    command.add_argument(
        "--batch", metavar="B", type=int, default=4, help="number of texts at a time (default: %(default)s)"
    )
    _add_model(command)

    command = commands.add_parser("eval", help="measure the perplexity of libraries and of the base on held-out texts")
    command.add_argument("library", metavar="FOLDER", nargs="+", type=Path, help="libraries with all adapters trained")
    _add_texts(command)
    command.add_argument(
        "--prompt-tokens",
        metavar="P",
        type=int,
        default=64,
        help="number of first tokens of a text by which its adapter is chosen (default: %(default)s)",
    )
    command.add_argument(
        "--length", metavar="T", type=int, default=256, help="largest number of tokens of a text (default: %(default)s)"
    )
    command.add_argument("--oracle", action="store_true", help="also show the best adapter for each text, as a bound")
    command.add_argument(
        "--priors", action="store_true",
        help="instead measure the KL divergence of the pruned base from the dense one, without a prior, with one prior"
        " and with the priors of clusters",
    )  # fmt: skip
    command.add_argument(
        "--density", type=float, default=0.5, help="density of the pruned base with --priors (default: %(default)s)"
    )
    command.add_argument(
        "--batch", metavar="B", type=int, default=4, help="number of texts at a time (default: %(default)s)"
    )
    command.add_argument("--output", metavar="FILE", type=Path, help="write all results to FILE as JSON")
    _add_model(command)


def _add_library(command: argparse.ArgumentParser, what: str = "library that moin cluster wrote") -> None:
    command.add_argument("library", metavar="FOLDER", type=Path, help=what)


def _add_texts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--text", metavar="FILE", nargs="+", type=Path, required=True,
        help="texts: JSONL files with one text per line, or text files (UTF-8) of one text each",
    )  # fmt: skip
    command.add_argument(
        "--column", default="text", help="column of JSONL files that holds the text (default: %(default)s)"
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    add_model_argument(command)
    add_dtype_argument(command)


def run(options: argparse.Namespace) -> None:
    """Run one of the commands."""
    commands = {"cluster": _cluster, "show": _show, "train": _train, "prior": _prior, "generate": _generate}
    (commands | {"eval": _evaluate})[options.action](options)


def _texts(options: argparse.Namespace) -> list[str]:
    return [text for text, *_ in _records(options, [options.column])]


def _records(options: argparse.Namespace, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The text of each line or file, and further columns; a text file has none, so its name stands in for them."""
    skipped, found = Skipped(), []
    for file in options.text:
        if file.suffix == ".jsonl":
            found += [record.texts for record in read_jsonl(file, columns, skipped)]
        else:
            found += [(text, *[name] * (len(columns) - 1)) for name, text in read_texts([file], skipped)]
    skipped.report()
    if not found:
        raise nothing_left(skipped, ", ".join(map(str, options.text)))
    return found


def _cluster(options: argparse.Namespace) -> None:
    embedding = EmbeddingConfig(options.layers, options.tokens, options.sentences)
    if options.clusters < 1:
        raise ValueError(f"--clusters must be at least 1, got {options.clusters}")
    check_output("FOLDER", options.library / "x" if options.library.is_dir() else options.library)
    records = _records(options, [options.column, *([options.kinds] if options.kinds else [])])
    texts = [text for text, *_ in records]
    llm = load_reader(options)
    assert llm.tokenizer is not None
    made = make_library(
        options.library,
        texts,
        [llm.tokenizer.encode(text) for text in texts],
        Embedder(embedding, llm.model),
        fingerprint(llm.model),
        count=options.clusters,
        method="random" if options.random else "kmeans",
        seed=options.seed,
    )
    _print(made)
    if options.kinds:
        _print_kinds(made, {record[0]: record[1] for record in records})


def _print_kinds(library: Library, kinds: Mapping[str, str]) -> None:
    """Print how many texts of each kind each cluster has, and how many texts are in a cluster of mostly their kind."""
    most = 0
    for number in range(len(library)):
        counts = Counter(kinds[text] for text in library.texts(number)).most_common()
        most += counts[0][1]
        print(f"cluster {number}: {', '.join(f'{count} {printable(kind)}' for kind, count in counts)}")
    total = sum(cluster.count for cluster in library.clusters)
    print(f"{most} of {total} texts ({most / total:.3f}) are in a cluster of mostly their kind")


def _show(options: argparse.Namespace) -> None:
    _print(Library.load(options.library))


def _print(library: Library) -> None:
    trained = set(library.trained())
    for number, cluster in enumerate(library.clusters):
        print(f"cluster {number}: {cluster.count:,} texts{', trained' if number in trained else ''}")
        for text in cluster.typical:
            print(f"    {shown(printable(text), sys.stdout)}")


def _train(options: argparse.Namespace) -> None:
    from griffin_jax.adapters.jobs import Job, train_clusters

    job = Job(read_options(options, AdapterConfig), read_options(options, TrainingConfig))
    job.adapter.check_trainable()
    for name, value in (("--at-once", options.at_once), ("--save-every", options.save_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    library = Library.load(options.library)
    numbers = list(range(len(library))) if options.cluster is None else [options.cluster]
    library.shard(numbers[0])
    _check_memory(options, job, min(options.at_once, len(numbers)))
    llm = load_reader(options)
    assert llm.tokenizer is not None
    library.check(fingerprint(llm.model))
    done = train_clusters(
        llm.model, llm.tokenizer, library, numbers, job,
        base=options.model, at_once=options.at_once, save_every=options.save_every,
    )  # fmt: skip
    there = len(library.trained())
    print(f"{options.library}: trained {len(done)} of {len(numbers)}; {there} of {len(library)} are there")


def _check_memory(options: argparse.Namespace, job: Job, at_once: int) -> None:
    """Check that this number of adapters can be trained together.

    Raises:
        MemoryError: there is not enough free memory.
        ValueError: sequences are longer than the model's context.
    """
    needs, training = chosen_needs(options), job.training
    check_length(needs.config, training.length)
    parts = needs.adapter_training(parameters_of(needs.config, job.adapter), training.batch, training.length, at_once)
    advice = f"take {'fewer --at-once, ' if at_once > 1 else ''}a smaller --batch or a shorter --length"
    check_fits(parts, advice)


def _generate(options: argparse.Namespace) -> None:
    griffin, generation = read_options(options, GriffinConfig), read_options(options, GenerationConfig)
    library = Library.load(options.library)
    llm = load_reader(options)
    prompts: list[Prompt] = list(options.prompt)
    settings = {"griffin": griffin, "generation": generation}
    if options.priors:
        answered = _answers_with_priors(llm, library, prompts, settings)
    else:
        answer: Generation = llm.generate(prompts, adapter=library, **settings)
        answered = list(zip(answer.texts, answer.clusters or (), strict=True))
    for number, (text, cluster) in enumerate(answered, start=1):
        if len(prompts) > 1:
            print(f"--- prompt {number}")
        print(shown(text, sys.stdout))
        print(f"[cluster {cluster}]", file=sys.stderr)


def _answers_with_priors(
    llm: LLM, library: Library, prompts: Sequence[Prompt], settings: Mapping[str, Any]
) -> list[tuple[str, int]]:
    """The text and the cluster of each answer."""
    answered = []
    for prompt in prompts:
        assert llm.tokenizer is not None
        chat = settings["generation"].chat
        tokens = llm.tokenizer.chat(str(prompt)) if chat else llm.tokenizer.encode(str(prompt))
        (cluster,) = library.route(library.embedder(llm.model, llm.tokenizer), [tokens]).tolist()
        adapter, prior = library.adapter(cluster, llm.config), library.prior(cluster)
        answer: Generation = llm.generate(tokens, adapter=adapter, prior=prior, **settings)
        answered.append((answer.texts[0], cluster))
    return answered


def _prior(options: argparse.Namespace) -> None:
    for name, value, least in (
        ("--window", options.window, 2),
        ("--rows", options.rows, 0),
        ("--batch", options.batch, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    library = Library.load(options.library)
    needs = chosen_needs(options)
    window = min(options.window, needs.config.max_positions)
    parts = needs.prior(options.batch, window, rows=options.rows, sketched=MOST_SKETCHED, budgets=False, written=False)
    check_fits(parts, "take a smaller --batch, a shorter --window or fewer --rows")
    llm = load_reader(options)
    assert llm.tokenizer is not None
    library.check(fingerprint(llm.model))
    (library.folder / "priors").mkdir(exist_ok=True)
    for number in range(len(library)):
        file = library.prior_file(number)
        if file.exists():
            print(f"{file} is there already; delete it to measure it anew")
            continue
        texts = [next(windows(llm.tokenizer, text, window)) for text in library.texts(number)]
        prior = measure(llm.model, texts, size=options.batch, rows=options.rows)
        prior.save(file)
        print(f"{file}: {prior.tokens:,} tokens in {len(texts):,} texts")


def _evaluate(options: argparse.Namespace) -> None:
    from griffin_jax.evaluation.moin import as_json, compare, table

    for name, value, least in (
        ("--prompt-tokens", options.prompt_tokens, 1),
        ("--length", options.length, options.prompt_tokens + 1),
        ("--batch", options.batch, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if options.output:
        check_output("--output", options.output)
    if options.priors and (len(options.library) > 1 or options.oracle or options.output):
        raise ValueError("--priors is for one library, without --oracle and --output")
    libraries = list(map(Library.load, options.library))
    texts = _texts(options)
    _check_scoring(options, libraries)
    llm = load_reader(options)
    assert llm.tokenizer is not None
    for library in libraries:
        library.check(fingerprint(llm.model))
    if options.priors:
        _evaluate_priors(llm, libraries[0], [llm.tokenizer.encode(text) for text in texts], options)
        return
    found = compare(
        llm.model, libraries, [llm.tokenizer.encode(text) for text in texts],
        prompt=options.prompt_tokens, length=options.length, size=options.batch, oracle=options.oracle,
        tokenizer=llm.tokenizer,
    )  # fmt: skip
    print(f"{len(found.tokens)} texts, {sum(found.tokens):,} tokens scored")
    print(table(found))
    if options.output:
        options.output.write_text(json.dumps(as_json(found)) + "\n", encoding="utf-8")


def _check_scoring(options: argparse.Namespace, libraries: Sequence[Library]) -> None:
    """Check that the texts can be scored.

    Raises:
        MemoryError: there is not enough free memory.
        ValueError: texts may be longer than the model's context.
    """
    needs = chosen_needs(options)
    check_length(needs.config, options.length)
    if options.priors:
        answer = options.length - options.prompt_tokens
        parts = needs.scoring(options.batch, options.prompt_tokens, answer, 2, rows=DEFAULT_ROWS)
    else:
        every = sum(len(library) * library.adapter_bytes for library in libraries)
        of_batch = max(adapter_bytes(library, options.batch) for library in libraries)
        parts = needs.likelihood(options.batch, options.length, every + of_batch)
    check_fits(parts, "take a smaller --batch or a shorter --length")


def _evaluate_priors(
    llm: LLM, library: Library, sequences: Sequence[Sequence[int]], options: argparse.Namespace
) -> None:
    from griffin_jax.evaluation.grid import RECONSTRUCTION
    from griffin_jax.evaluation.moin import compare_priors

    for steps in ("", f"+{RECONSTRUCTION}"):
        found = compare_priors(
            llm.model, library, sequences,
            prompt=options.prompt_tokens, length=options.length, size=options.batch,
            density=options.density, steps=steps, tokenizer=llm.tokenizer,
        )  # fmt: skip
        for name, interval in found.items():
            print(f"{name}{steps}: KL {interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f}) nats/token")
