"""The options of `LLM.generate`: the fields of three dataclasses, each declared and checked once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from griffin_jax.adapters.adapter import Adapter
from griffin_jax.adapters.library import Library
from griffin_jax.extensions.config import Extensions
from griffin_jax.generation.config import GenerationConfig
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.utils.deprecation import warn_renamed
from griffin_jax.utils.options import names_of

AdapterLike = Adapter | Sequence[Adapter | None] | Library
"""An adapter, one for each prompt, or a library that chooses."""

GROUPS: dict[str, Any] = {"griffin": GriffinConfig, "extensions": Extensions, "generation": GenerationConfig}
"""The options classes, by the argument that takes one whole."""

OPTIONS: dict[str, Any] = names_of(*GROUPS.values())
"""All options of `LLM.generate` with their defaults."""

RENAMED = {"multiple": "round_to", "shards": "groups", "reconstruct": "refit", "lossless": "speculative"}
"""Options of version 0.1 that have another name now."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What is wanted of a generation, checked.

    Attributes:
        griffin: how the model is pruned.
        extensions: the steps beyond GRIFFIN.
        generation: what the answers are to be like.
        experts: neurons that are kept whatever the density and the method; None to select them.
        adapter: that the model has for these prompts, one for each of them, or a library that chooses.

    Raises:
        ValueError: options do not go together.
    """

    griffin: GriffinConfig = GriffinConfig()
    extensions: Extensions = Extensions()
    generation: GenerationConfig = GenerationConfig()
    experts: ExpertNeurons | None = None
    adapter: AdapterLike | None = None

    def __post_init__(self) -> None:
        self.extensions.check(self.griffin)
        if self.experts is not None and self.extensions.max_divergence is not None:
            raise ValueError("experts are kept whatever they lose: give a least density, or max_divergence=None")
        if self.adapter is not None and self.extensions.healing is not None:
            raise ValueError("a healing is for the model without an adapter: give one of the two")

    @classmethod
    def of(
        cls,
        function: str,
        experts: ExpertNeurons | None = None,
        adapter: AdapterLike | None = None,
        **options: Any,
    ) -> Request:
        """A request from keyword arguments.

        Args:
            function: what they were given to, for messages.
            experts: as the attribute.
            adapter: as the attribute.
            **options: those of `OPTIONS`; or whole groups of them as `griffin`, `extensions` or `generation`, whose
                values single options replace.

        Raises:
            TypeError: there is no such option.
            ValueError: a value is outside its range, or options do not go together.
        """
        for old in RENAMED.keys() & options.keys():
            new = RENAMED[old]
            if new in options:
                raise TypeError(f"{function}() got {old!r} and {new!r}, which are the same option")
            warn_renamed(f"{function}({old}=...)", f"{new}=...", stacklevel=4)
            options[new] = options.pop(old)
        if unknown := sorted(options.keys() - OPTIONS.keys() - GROUPS.keys()):
            raise TypeError(f"{function}() got unexpected options: {', '.join(unknown)}; see help(LLM.generate)")
        groups = {}
        for name, group in GROUPS.items():
            given = {field: options[field] for field in names_of(group) if field in options}
            whole = options.get(name)
            groups[name] = group(**given) if whole is None else dataclasses.replace(whole, **given)
        return cls(**groups, experts=experts, adapter=adapter)


def updated(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Options with changes to them: a whole group among the changes replaces every option of that group.

    Args:
        options: keyword arguments of `LLM.generate`.
        changes: others of them.
    """
    replaced = {field for name, group in GROUPS.items() if changes.get(name) is not None for field in names_of(group)}
    for names in RENAMED.items():
        if not (replaced | changes.keys()).isdisjoint(names):
            replaced |= {*names}
    return {name: value for name, value in options.items() if name not in replaced} | {**changes}


def signature(function: Any) -> inspect.Signature:
    """The signature of a function that takes `**options`, with every option in it, for `help` and editors."""
    own = inspect.signature(function)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for group in GROUPS.values()
        for field in dataclasses.fields(group)
    ]
    whole = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=f"{group.__name__} | None")
        for name, group in GROUPS.items()
    ]
    return own.replace(parameters=[*parameters, *named, *whole])


def check_options(in_place: bool = False, **options: Any) -> None:
    """Raise as `LLM.generate` would for these options, before a model is loaded.

    Args:
        in_place: whether it is to be loaded with every neuron held once.
        **options: those of `LLM.generate`.
    """
    request = Request.of("generate", **options)
    if in_place:
        check_in_place(request)


def check_in_place(request: Request, *, chooses: bool = False) -> None:
    """Raise `ValueError` if a model that holds every neuron once cannot answer a request.

    Args:
        request: what is asked for.
        chooses: whether neurons are only chosen.
    """
    if against := against_in_place(request, chooses=chooses):
        raise ValueError(against)


def against_in_place(request: Request, *, chooses: bool = False) -> str | None:
    """Why a model that holds every neuron once cannot answer a request, as `check_in_place`; None if it can."""
    extensions, answers = request.extensions, not chooses
    for asked, why, instead in (
        (extensions.prior is not None, "a prior cannot be known to be theirs", "prior=None"),
        (extensions.mixed_weights is not None, "those in fewer bits do not", "mixed_weights=None"),
        (extensions.max_divergence is not None, "nothing is tried before", "max_divergence=None"),
        (request.adapter is not None, "those of an adapter do not", "merge it"),
        (extensions.healing is not None, "those of a healing do not", "healing=None"),
        (answers and extensions.rows, "the kept ones are the model's own and cannot be refitted", "refit=False"),
        (answers and extensions.refresh_every, "all would be regrouped at every refresh", "refresh_every=None"),
        (answers and extensions.drafter is not None, "those of a drafter do not", "draft_weights=None"),
    ):
        if asked:
            return f"with in_place rows of weights move, and {why}: {instead}, or load the model without"
    return None
