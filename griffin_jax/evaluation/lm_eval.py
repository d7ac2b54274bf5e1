"""The model `griffin_jax` for lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    griffin-jax lm-eval --model_args path=smollm2-135m-instruct,density=0.5 --tasks hellaswag --limit 100

The harness itself makes requests from a task's texts, and figures from the scores; this module only answers its three
kinds of requests:

    loglikelihood          the full model reads a context, the model pruned for that context reads its continuation
    loglikelihood_rolling  the full model reads the first share of each window of a text, the pruned one the rest
    generate_until         answers as `LLM.generate` writes them

At a density of 1, the answers to all of them are those of the harness's own model `hf`. Versions of the harness that
know plugins import this module themselves (the entry point `lm_eval.models`); otherwise `griffin-jax lm-eval` does.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
from jax.sharding import Mesh
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from griffin_jax import __version__
from griffin_jax.adapters.adapter import Adapter, attach
from griffin_jax.adapters.library import Library
from griffin_jax.adapters.peft import load_adapter
from griffin_jax.checkpoints import demo
from griffin_jax.evaluation.grid import seed_of
from griffin_jax.evaluation.likelihood import Likelihood, Passage, continuation, last_token, likelihoods, window
from griffin_jax.extensions.prior import Prior
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.prune import check_kept
from griffin_jax.llm.llm import LLM, load
from griffin_jax.llm.memory import Parts, fitting, needs_before_loading, needs_of
from griffin_jax.llm.request import RENAMED, Request, check_options
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.parallel.mesh import DATA_AXIS, axis_size, make_mesh
from griffin_jax.utils import memory
from griffin_jax.utils.deprecation import warn_renamed

NAME = "griffin_jax"

AUTO_BATCH = 8
"""The largest number of rows of a batch if the harness asks for an automatic size."""

USUAL_LENGTH = 1024
"""The length of a sequence, in tokens, for which it is predicted whether a batch fits into memory."""

PLATFORMS = ("cpu", "gpu", "tpu")
"""The allowed values of `--device`."""

UNSAID = "cuda:0"
"""The device that the harness passes if the command names none."""

GENERATION = (
    "until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "num_beams", "stop_token_ids",
)  # fmt: skip
"""The generation arguments of tasks that are supported; `num_beams` may only be 1."""

logger = logging.getLogger(__name__)


PRUNING = (*(field.name for field in dataclasses.fields(GriffinConfig)), "quality")
"""The options of `LLM.generate` that `model_args` may contain."""


@register_model(NAME)
class GriffinLM(TemplateLM):
    """A pruned (or dense) language model with the interface that the harness expects.

    Continuations are scored as if they had been generated: the context is the prompt, the continuation is the answer.
    The full model then predicts the continuation's first token, so pruning changes nothing if all continuations are one
    token long. `last_token_only` is the paper's way: the model's input is all but the last token of context and
    continuation, and only the last token of that input is read by the pruned model, with neurons chosen by the tokens
    before it.

    Perplexity tasks score every token of a text, in the harness's windows. Only one token stands before most windows,
    which is too little to choose neurons by. So the full model reads and scores the first share of each window,
    `rolling_prompt`, which serves as the prompt of the rest. The figure is a mixture of both models' by design.

    Sequences that are longer than `max_length` lose tokens on the left.

    Args:
        path: what `griffin_jax.load` takes, or a model that it has loaded.
        dtype: dtype of the computation: float32, bfloat16 or float16. By default float32 on CPUs, bfloat16 on
            accelerators.
        weights: format of the matrices, such as `int8`; see `griffin_jax.load`.
        prior: file that `griffin-jax prior` wrote, or a `Prior` that was read from it: neurons are then also chosen by
            general text.
        adapter: folder of an adapter in PEFT's format, which the model has for all requests.
        moin: folder of a library that chooses an adapter for each context. For a window of a text, it chooses by the
            first part, whose share is `rolling_prompt`. With `shared`, only contexts of one cluster share neurons.
        seed: seed of all draws; the harness's `--seed` is another one. The same command gives the same results. Neurons
            for scored tokens are drawn with a seed made of this one and the tokens by which they are chosen, so the
            batch does not matter; neurons for generated answers, and the answers' tokens, are drawn with a seed made of
            this one and the number of the batch.
        last_token_only: whether continuations are scored the paper's way.
        rolling_prompt: share of each window that the full model reads in perplexity tasks, in [0, 1).
        max_length: length of the longest input, in tokens; by default the model's context.
        max_gen_toks: length of the longest answer, in tokens, if a task does not say.
        add_bos_token: whether texts begin with the tokenizer's first token; by default as the tokenizer was trained.
        prefix_token_id: token that stands before a text without a context; by default the tokenizer's first token, or
            else the one that ends a text.
        chat_template_args: arguments of the chat template besides the messages, such as `{"enable_thinking": false}`.
        allow_pickle: whether to read PyTorch's pickle files.
        data: number of devices that batches are divided among, as in `--mesh data=2,model=4`.
        model: number of devices that the model is divided among.
        expert_parallel: whether each of these devices has whole experts, if the model has routed experts.
        batch_size: number of different contexts, windows or prompts at a time, or "auto". Unless `shared`, each keeps
            its own neurons, so memory must hold as many sets of kept weights while answers are written.
        max_batch_size: the largest batch that "auto" takes.
        **options: `density`, `method`, `shared`, `round_to` and `groups` of `GriffinConfig` (with `shared`, scores
            depend on the batches; `groups` is 1 by default, so that scores do not depend on the number of devices), and
            `quality` of `Extensions`: `griffin`, or `best` for prior, budgets and refit.
        device: cpu, gpu or tpu, to make sure that JAX runs there; JAX itself chooses by JAX_PLATFORMS. The harness
            passes cuda:0 if the command names no device, so cuda:0 stands for any device.

    Raises:
        FileNotFoundError: the model, prior, adapter or library does not exist, or the library has adapters that are not
            trained.
        ValueError: an argument is unknown or outside its range; the model is not supported or has no tokenizer; the
            prior, adapter or library belongs to another model; an adapter is given together with a library or a prior;
            there are fewer devices; or the devices cannot share the kept neurons evenly.
    """

    def __init__(
        self,
        path: str | LLM = demo.NAME,
        *,
        dtype: str | None = None,
        weights: str | None = None,
        prior: str | Prior | None = None,
        adapter: str | None = None,
        moin: str | None = None,
        seed: int = 0,
        last_token_only: bool = False,
        rolling_prompt: float = 0.5,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        allow_pickle: bool = False,
        data: int = 1,
        model: int = 1,
        expert_parallel: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        for old in RENAMED.keys() & options.keys():
            warn_renamed(f"GriffinLM({old}=...)", f"{RENAMED[old]}=...")
            options[RENAMED[old]] = options.pop(old)
        if unknown := sorted(options.keys() - PRUNING):
            raise ValueError(f"model_args has {', '.join(unknown)}; allowed are {', '.join((*ARGUMENTS, *PRUNING))}")
        self._prior = prior if isinstance(prior, Prior) or prior is None else Prior.load(prior)
        if adapter is not None and moin is not None:
            raise ValueError("an adapter for all requests and a library that chooses: give adapter or moin, not both")
        if adapter is not None and prior is not None:
            raise ValueError("a prior is for a model without an adapter: give prior or adapter, not both")
        self._library = None if moin is None else Library.load(moin)
        self._adapter_files = {"adapter": adapter, "moin": moin}
        # Scores must not depend on the number of devices.
        options.setdefault("groups", 1)
        self._request = Request.of("GriffinLM", prior=self._prior, seed=seed, **options)
        self._pruner = Pruner.of(self._request.griffin, self._request.extensions)
        if not isinstance(max_gen_toks, int) or max_gen_toks < 1:
            raise ValueError(f"max_gen_toks must be a whole number of at least 1, got {max_gen_toks!r}")
        if (data, model) != (1, 1) and isinstance(path, LLM):
            raise ValueError("data and model are for a path: load the model with mesh=...")
        mesh = None if (data, model) == (1, 1) else make_mesh(data, model)
        self._seed = seed
        self._last_token_only = last_token_only
        if not (isinstance(rolling_prompt, int | float) and 0 <= rolling_prompt < 1):
            raise ValueError(f"rolling_prompt must be in [0, 1), got {rolling_prompt!r}")
        self._rolling_prompt = rolling_prompt
        self.max_gen_toks = max_gen_toks
        self._add_bos_token = add_bos_token
        self._template_arguments = dict(chat_template_args or {})
        wanted, largest = _rows(batch_size, max_batch_size)
        _check_device(device)
        self.batch_size, line = self._fitting_batch(
            path, dtype, weights, allow_pickle, mesh, expert_parallel, wanted, largest, max_length
        )
        if wanted is None:
            logger.info(line)

        self._llm = (
            path
            if isinstance(path, LLM)
            else load(
                str(path),
                dtype,
                allow_pickle=allow_pickle,
                mesh=mesh,
                weights=weights,
                expert_parallel=expert_parallel,
            )
        )
        if self._llm.tokenizer is None:
            raise ValueError(f"{self._llm.name} has no tokenizer, and the harness's requests are texts")
        self.tokenizer = self._llm.tokenizer
        if self._prior is not None or self._library is not None:
            found = fingerprint(self._llm.model)
            for whose in (self._prior, self._library):
                if whose is not None:
                    whose.check(found)
        if adapter is not None:
            adapted = attach(self._llm.model, load_adapter(adapter, self._llm.config))
            self._llm = LLM(adapted, self.tokenizer, f"{self._llm.name}+{adapter}")
        config = self._llm.config
        self._kept = self._pruner.config.kept(self._llm.model.config.neuron_ranges)
        check_kept(self._llm.model, self._pruner.config)
        self.max_length = config.max_positions if max_length is None else max_length
        if not isinstance(self.max_length, int) or not 2 <= self.max_length <= config.max_positions:
            raise ValueError(
                f"max_length must be in [2, {config.max_positions}], the model's context; got {max_length!r}"
            )
        own = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        ids = (prefix_token_id, *(token for token in own if token is not None and token < config.vocab_size))
        prefix = next((token for token in ids if token is not None), None)
        if prefix is None:
            raise ValueError("the tokenizer has no token that begins or ends a text; give prefix_token_id")
        if not isinstance(prefix, int) or not 0 <= prefix < config.vocab_size:
            raise ValueError(f"prefix_token_id must be in [0, {config.vocab_size - 1}], got {prefix!r}")
        self._prefix = prefix

    def _fitting_batch(
        self,
        path: str | LLM,
        dtype: str | None,
        weights: str | None,
        allow_pickle: bool,
        mesh: Mesh | None,
        expert_parallel: bool,
        wanted: int | None,
        largest: int,
        max_length: int | None,
    ) -> tuple[int, str]:
        """The batch size that fits into memory with sequences of `USUAL_LENGTH` tokens, and a line about it."""
        if isinstance(path, LLM):
            needs, devices = needs_of(path.model), path.model.embedding[...].devices()
        else:
            needs = needs_before_loading(path, dtype, weights, allow_pickle, mesh, expert_parallel)
            devices = jax.devices()[:1] if mesh is None else mesh.devices.flat
        length = min(USUAL_LENGTH, needs.config.max_positions)
        # Lengths that are not allowed are refused later, when the model's context is known.
        length = min(length, max_length) if isinstance(max_length, int) and max_length > 1 else length
        new = min(self.max_gen_toks, max(1, length // 2))
        kept = self._pruner.config.kept(needs.config.neuron_ranges)
        shared = self._pruner.config.shared
        general = self._pruner.calibration

        def needed(batch: int) -> Parts:
            rows = self._pruner.rows_of_each(batch)
            options = {"rows": rows, "calibration": general[0].shape[0] if general else 0, "shared": shared}
            work = (
                needs.scoring(batch, length, new, 0, **options),
                needs.generation(batch, length, new, kept, **options),
            )
            return max(work, key=lambda parts: sum(parts.values()))

        sizes = [wanted] if wanted else [1 << power for power in range(largest.bit_length())]
        of_data = axis_size(mesh, DATA_AXIS)
        sizes = [size for size in sizes if size % of_data == 0] or sizes[-1:]
        advice = "take a smaller batch_size, weights of fewer bits or shared=True"
        return fitting({size: needed(size) for size in sizes}, memory.free(devices), advice, wanted=wanted)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = self.tokenizer.eos_token_id
        return self._prefix if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """A name by which the harness keeps the stored requests of different models apart."""
        return self._llm.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results, next to `model_args`."""
        model = self._llm.model
        return {
            "model_name": self._llm.name,
            "model_num_parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
            "model_dtype": str(model.dtype),
            "model_weights": str(model.weights),
            **self._pruning(),
            "prior": None if self._prior is None else f"{self._prior.tokens} tokens of text",
            "kept_neurons": list(self._kept),
            **self._adapter_files,
            "seed": self._seed,
            "last_token_only": self._last_token_only,
            "rolling_prompt": self._rolling_prompt,
            "max_length": self.max_length,
            "prefix_token_id": self._prefix,
            "griffin_jax_version": __version__,
            "jax_version": jax.__version__,
            "jax_backend": jax.default_backend(),
        }

    def _pruning(self) -> dict[str, Any]:
        griffin = {
            field.name: getattr(self._request.griffin, field.name) for field in dataclasses.fields(GriffinConfig)
        }
        return griffin | {"quality": self._request.extensions.quality}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The token ids of a text; a first token that the text contains already is not added again."""
        if add_special_tokens is not None:
            return self.tokenizer.encode(string, add_special_tokens)
        if has_bos_prefix(string, self.tokenizer.decode([self._prefix], skip_special=False)):
            return self.tokenizer.encode(string, special=False)
        tokens = self.tokenizer.encode(string, special=self._add_bos_token is not False)
        first = self.tokenizer.bos_token_id
        if self._add_bos_token and first is not None and tokens[:1] != [first]:
            tokens.insert(0, first)
        return tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat, up to the model's answer or to the end of the last message."""
        try:
            return self._chat_text(chat_history, add_generation_prompt)
        except ValueError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            text = self._chat_text(without, add_generation_prompt)
            utils.warning_once(logger, "The chat template takes no system message; it is left out.")
            return text

    def _chat_text(self, messages: Sequence[Mapping[str, str]], begin_answer: bool) -> str:
        return self.tokenizer.chat_text(messages, begin_answer=begin_answer, **self._template_arguments)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log p of each continuation in nats, and whether all of its tokens are the most probable ones.

        An empty continuation of an empty context has probability 1.
        """
        # The harness reads the first token of what follows an empty context, so it must not be empty.
        given = [number for number, request in enumerate(requests) if any(request.args)]
        answers = [(0.0, True)] * len(requests)
        found = super().loglikelihood([requests[number] for number in given], disable_tqdm)
        for number, answer in zip(given, found, strict=True):
            answers[number] = answer
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._fit(context or [self._prefix], tokens) for _, context, tokens in requests]
        self._warn_of_cut(sum(cut for *_, cut in pairs), "request", len(pairs))
        if pairs and not self._last_token_only and self._is_pruned and all(len(tokens) <= 1 for _, tokens, _ in pairs):
            logger.warning(
                "All continuations are one token long, which the full model predicts: the density has no effect on"
                " them. With last_token_only=True it has."
            )
        answers = [(0.0, True)] * len(pairs)
        numbers = [number for number, (_, tokens, _) in enumerate(pairs) if tokens]
        passage = last_token if self._last_token_only else continuation
        passages = [passage(context, tokens) for context, tokens, _ in pairs if tokens]
        for index, score in self._scores(passages, "Running loglikelihood requests", disable_tqdm):
            number = numbers[index]
            answers[number] = score.log, score.greedy
            self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text in nats, scored in the windows that the harness's own models use."""
        windows = [
            (number, *utils.make_disjoint_window(pair))
            for number, request in enumerate(requests)
            for pair in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self._prefix,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        passages = [window(context, tokens, self._rolling_prompt) for _, context, tokens in windows]
        totals = [0.0] * len(requests)
        # Added up in the order of the texts, so that rounding does not depend on the order of the batches.
        scores = dict(self._scores(passages, "Running loglikelihood_rolling requests", disable_tqdm))
        for index, (number, *_) in enumerate(windows):
            totals[number] += scores[index].log
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context, without stop strings and what follows them."""
        groups: dict[str, list[int]] = {}
        arguments = cast("list[tuple[str, dict[str, Any]]]", [request.args for request in requests])
        for number, (_, gen_kwargs) in enumerate(arguments):
            groups.setdefault(json.dumps(gen_kwargs, sort_keys=True, default=str), []).append(number)
        answers = [""] * len(requests)
        batches = 0
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as progress:
            for numbers in groups.values():
                new, options = self._options(arguments[numbers[0]][1])
                whole = {number: self.tok_encode(arguments[number][0]) or [self._prefix] for number in numbers}
                prompts = {number: tokens[new - self.max_length :] for number, tokens in whole.items()}
                self._warn_of_cut(sum(len(whole[n]) > len(prompts[n]) for n in numbers), "prompt", len(numbers))
                numbers.sort(key=lambda number: -len(prompts[number]))
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    rows = [prompts[number] for number in batch]
                    if not self._pruner.config.shared:
                        # A full batch compiles nothing; but with shared neurons, every row influences the choice.
                        rows += [rows[-1]] * (self.batch_size - len(rows))
                    texts = self._answers(rows, new, options, seed_of(self._seed, f"batch {batches}"))
                    batches += 1
                    for number, text in zip(batch, texts, strict=False):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", arguments[number], text)
                        progress.update()
        return answers

    def _answers(self, prompts: list[list[int]], new: int, options: Mapping[str, Any], seed: int) -> Iterable[str]:
        library = self._library
        of_one_model = self._request.extensions.rows > 0 or self._request.griffin.method == "magnitude"
        if library is None or not of_one_model:
            return self._written(prompts, library, new, options, seed)
        # Rows are refitted to one model, and weights ranked in one: the prompts of each cluster are answered together.
        found = [""] * len(prompts)
        for adapter, numbers in self._by_cluster(library, prompts):
            rows = [prompts[number] for number in numbers]
            if not self._pruner.config.shared:
                rows += [rows[-1]] * (len(prompts) - len(rows))
            texts = self._written(rows, adapter, new, options, seed)
            for number, text in zip(numbers, texts, strict=False):
                found[number] = text
        return found

    def _written(
        self,
        prompts: list[list[int]],
        adapter: Adapter | Library | None,
        new: int,
        options: Mapping[str, Any],
        seed: int,
    ) -> Iterable[str]:
        griffin, extensions = self._request.griffin, self._request.extensions
        generation = self._llm.generate(
            prompts,
            griffin=griffin,
            extensions=extensions,
            adapter=adapter,
            max_new_tokens=new,
            seed=seed,
            **options,
        )
        for text, tokens in zip(generation.texts, generation.tokens, strict=True):
            # The model's configuration may name other tokens that end an answer than the tokenizer does.
            if self.eot_token_id in tokens:
                text = self.tokenizer.decode(tokens[: tokens.index(self.eot_token_id)])
            yield postprocess_generated_text(text, list(options["stop"]), None)

    def _options(self, arguments: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """The length of the longest answer, and options of `LLM.generate`, from a task's generation arguments."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), self.max_gen_toks))
        if unknown := sorted(given.keys() - set(GENERATION)):
            raise ValueError(f"gen_kwargs has {', '.join(unknown)}; allowed are {', '.join(GENERATION)}")
        if given.get("num_beams", 1) != 1:
            raise ValueError(f"gen_kwargs has num_beams {given['num_beams']!r}; there is no beam search, allowed is 1")
        new = given["max_gen_toks"]
        if not 1 <= new < self.max_length:
            raise ValueError(
                f"max_gen_toks must be in [1, {self.max_length - 1}], as the model reads {self.max_length} tokens with"
                f" those it writes; got {new}. Give --gen_kwargs max_gen_toks=..."
            )
        options: dict[str, Any] = {"stop": [stop for stop in given["until"] if stop]}
        if given.get("stop_token_ids"):
            options["stop_token_ids"] = given["stop_token_ids"]
        if given["do_sample"]:
            # Values that mean "off" in other libraries.
            off = {"top_k": (0, -1), "top_p": (1,), "min_p": (0,)}
            options["temperature"] = given.get("temperature", 0.0)
            if options["temperature"] <= 0:
                raise ValueError("gen_kwargs has do_sample without a temperature above 0; give one, or do_sample=False")
            options |= {name: given[name] for name in off if given.get(name) not in (None, *off[name])}
        check_options(**options)
        return new, options

    @property
    def _is_pruned(self) -> bool:
        return self._kept != self._llm.model.neurons

    def _fit(self, context: list[int], tokens: list[int]) -> tuple[list[int], list[int], bool]:
        """Context and continuation, cut on the left to what the model can read, and whether anything was cut.

        The last token is not read, so there may be one token more than the model reads. At least one token of context
        remains.
        """
        keep = self.max_length + 1
        scored = tokens[-(keep - 1) :]
        kept = (context + tokens)[-keep:] if tokens else context
        return kept[: len(kept) - len(scored)], scored, len(kept) < len(context) + len(tokens)

    def _warn_of_cut(self, cut: int, what: str, total: int) -> None:
        if cut:
            logger.warning(
                f"{cut} of {total} {what}s are longer than the {self.max_length} tokens that are read; what is too much"
                " on the left is left out."
            )

    def _scores(self, passages: Sequence[Passage], name: str, quiet: bool) -> Iterable[tuple[int, Likelihood]]:
        return tqdm(self._likelihoods(passages), desc=name, total=len(passages), disable=quiet)

    def _likelihoods(self, passages: Sequence[Passage]) -> Iterable[tuple[int, Likelihood]]:
        """The score of each passage, with the adapter that the library chooses for what stands before the answer."""
        options: dict[str, Any] = {"size": self.batch_size, "seed": self._seed}
        if self._library is None or not passages:
            yield from likelihoods(self._llm.model, passages, self._pruner, **options)
            return
        for adapter, numbers in self._by_cluster(self._library, [(*p.prompt, *p.more) for p in passages]):
            adapted = attach(self._llm.model, adapter)
            some = [passages[number] for number in numbers]
            for number, score in likelihoods(adapted, some, self._pruner, **options):
                yield numbers[number], score

    def _by_cluster(self, library: Library, contexts: Sequence[Sequence[int]]) -> Iterator[tuple[Adapter, list[int]]]:
        """Yields the adapter of each cluster that contexts are assigned to, with the numbers of these contexts."""
        model = self._llm.model
        chosen = library.route(library.embedder(model, self.tokenizer), contexts).tolist()
        for cluster in sorted(set(chosen)):
            yield library.adapter(cluster, model.config), [n for n, own in enumerate(chosen) if own == cluster]


ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(GriffinLM).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
)
"""The arguments that `model_args` may contain, besides `PRUNING`."""


def _rows(batch_size: int | str, most: int | None) -> tuple[int | None, int]:
    """The batch size that is asked for (None for the largest that fits), and the largest to try."""
    if str(batch_size).split(":")[0] == "auto":
        return None, AUTO_BATCH if most is None else min(AUTO_BATCH, int(most))
    try:
        rows = int(batch_size)
    except ValueError:
        rows = 0
    if rows < 1:
        raise ValueError(f'batch_size must be a whole number of at least 1 or "auto", got {batch_size!r}')
    return rows, rows


def _check_device(device: str | None) -> None:
    if device is None or device == UNSAID:
        return
    if device not in PLATFORMS:
        raise ValueError(f"device must be one of {', '.join(PLATFORMS)}, got {device!r}")
    if device != jax.default_backend():
        raise ValueError(
            f"device is {device!r}, but JAX runs on {jax.default_backend()}; install JAX for that device, or choose it"
            " with the environment variable JAX_PLATFORMS"
        )
