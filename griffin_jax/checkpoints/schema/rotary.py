"""How rotary position embeddings are read from configurations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from griffin_jax.checkpoints.schema.attributes import Attributes, warn_of_unread
from griffin_jax.checkpoints.schema.relevance import read_of_rope_parameters
from griffin_jax.model.config import Rotary


def read_rotary(
    attributes: Attributes,
    max_positions: int,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    share: float | None = None,
    original: int | None = None,
    kinds: Mapping[str, str] | None = None,
    query_growth: str = "",
    magnitudes: bool = False,
) -> Rotary:
    """Rotary embedding, from `rope_theta` and `rope_scaling` or from transformers 5's `rope_parameters`.

    Args:
        attributes: attributes of the configuration.
        max_positions: the context, in tokens.
        head_dim: H, the size of a head.
        theta: the family's default base.
        share: the family's default for the share of a head that turns; None if it turns whole heads only.
        original: the family's default for the context of the unscaled model, in tokens; None to look in `rope_scaling`.
        kinds: meanings of all kinds that the family has, by their names there; None for the usual ones.
        query_growth: the family's name for `Rotary.query_growth`, if it has that.
        magnitudes: whether `short_mscale` and `long_mscale` say what the attention factor of LongRoPE is.

    Raises:
        ValueError: the kind is not supported, or an attribute is missing or not understood.
    """
    theta = attributes.take("rope_theta", float, default=theta)
    given_share = attributes.take("partial_rotary_factor", float)
    original = attributes.take("original_max_position_embeddings", int, default=original)
    scaling = attributes.take("rope_scaling", dict, default={})
    parameters = attributes.take("rope_parameters", dict, default={})
    if scaling and parameters and scaling != parameters:
        raise ValueError(
            f"{attributes.where}: rope_scaling {scaling} and rope_parameters {parameters} contradict each other"
        )
    if given_share is not None:
        parameters = {"partial_rotary_factor": given_share, **(scaling or parameters)}
    return rotary_of(
        parameters or scaling,
        f"{attributes.where}: rotary embedding",
        max_positions,
        head_dim,
        theta=theta,
        share=share,
        original=original,
        kinds=kinds,
        query_growth=query_growth,
        magnitudes=magnitudes,
    )


def rotary_of(
    parameters: Mapping[str, Any],
    where: str,
    max_positions: int,
    head_dim: int,
    *,
    theta: float,
    share: float | None = None,
    original: int | None = None,
    kinds: Mapping[str, str] | None = None,
    query_growth: str = "",
    magnitudes: bool = False,
) -> Rotary:
    """Rotary embedding from the value of `rope_scaling` or `rope_parameters`.

    Args:
        parameters: that value.
        where: where it is from, for messages.
        max_positions: the context, in tokens.
        head_dim: H, the size of a head.
        theta: base, if `parameters` has none.
        share: share of a head that turns, if `parameters` has none; None if it must be the whole head.
        original: context of the unscaled model, in tokens, which takes precedence over that in `parameters`.
        kinds: meanings of all allowed kinds, by their names; None for the usual ones.
        query_growth: name of `Rotary.query_growth` in `parameters`, if the family has that.
        magnitudes: whether `short_mscale` and `long_mscale` say what the attention factor of LongRoPE is.

    Raises:
        ValueError: the kind is not supported, or an attribute is missing or not understood.
    """
    rope = Attributes(parameters, where)
    legacy_kind = rope.take("type", str, default="default")
    kind = rope.take("rope_type", str, default=legacy_kind)
    if kinds is not None:
        if kind not in kinds:
            raise ValueError(f"{where}: kind {kind!r}; supported are {', '.join(kinds)}")
        kind = kinds[kind]
    theta = rope.take("rope_theta", float, default=theta)
    given_share = rope.take("partial_rotary_factor", float, default=share or 1.0)
    if share is None and given_share != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor is {given_share}; this family turns whole heads only")
    dims = int(head_dim * given_share)
    plain = Rotary(theta=theta, dims=None if dims == head_dim else dims)
    if kind in ("llama3", "yarn", "longrope"):
        inner = rope.take("original_max_position_embeddings", int, default=max_positions)
        original = inner if original is None else original

    if kind == "default":
        rotary = plain
    elif kind == "dynamic":
        # Dynamic NTK scaling changes the wavelengths only beyond max_position_embeddings, and no
        # prompt with its answer may be longer than that here.
        rope.take("factor", float)
        rope.take("original_max_position_embeddings", int)
        rotary = plain
    elif kind == "linear":
        rope.require("factor")
        rotary = dataclasses.replace(plain, kind="linear", factor=rope.take("factor", float))
    elif kind == "llama3":
        rope.require("factor", "low_freq_factor", "high_freq_factor")
        rotary = dataclasses.replace(
            plain,
            kind="llama3",
            factor=rope.take("factor", float),
            original_positions=original or 0,
            low_freq_factor=rope.take("low_freq_factor", float),
            high_freq_factor=rope.take("high_freq_factor", float),
        )
    elif kind == "yarn":
        rotary = _read_yarn(rope, plain, original or max_positions, max_positions)
    elif kind == "longrope":
        rotary = _read_longrope(rope, plain, original or max_positions, max_positions)
        if magnitudes:
            rotary = dataclasses.replace(rotary, attention_factor=_read_magnitude(rope))
    else:
        raise ValueError(f"{rope.where}: kind {kind!r}; supported are default, linear, dynamic, llama3, yarn, longrope")
    if query_growth:
        # The context is here, too, and says the same as outside.
        rope.ignore("max_position_embeddings")
        growth = rope.take(query_growth, float, default=0.0)
        context = rope.take("original_max_position_embeddings", int, default=max_positions)
        rotary = dataclasses.replace(
            rotary, query_growth=growth, original_positions=context if growth else rotary.original_positions
        )
    if rest := rope.rest():
        warn_of_unread(f"{rope.where} of kind {kind!r}", rest, read_of_rope_parameters())
    return rotary


def _read_longrope(rope: Attributes, plain: Rotary, original: int, max_positions: int) -> Rotary:
    rope.require("short_factor", "long_factor")
    factor = rope.take("factor", float, default=max_positions / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = {}
    for name in ("short_factor", "long_factor"):
        factors[name] = rope.take(name, list)
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in factors[name]):
            raise ValueError(f"{rope.where}: {name} must be numbers, got {factors[name]!r}")
    return dataclasses.replace(
        plain,
        kind="longrope",
        original_positions=original,
        attention_factor=rope.take("attention_factor", float, default=default),
        short_factors=tuple(map(float, factors["short_factor"])),
        long_factors=tuple(map(float, factors["long_factor"])),
    )


def _read_magnitude(rope: Attributes) -> float:
    names = "short_mscale", "long_mscale"
    rope.require(*names)
    short, long = (rope.take(name, float) for name in names)
    if short != long:
        raise ValueError(f"{rope.where}: short_mscale is {short} and long_mscale {long}; only equal ones are supported")
    return short


def _read_yarn(rope: Attributes, plain: Rotary, original: int, max_positions: int) -> Rotary:
    factor = rope.take("factor", float, default=max_positions / original)
    mscale, mscale_all = rope.take("mscale", float), rope.take("mscale_all_dim", float)

    def magnitude(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    default = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude()
    return dataclasses.replace(
        plain,
        kind="yarn",
        factor=factor,
        original_positions=original,
        beta_fast=rope.take("beta_fast", float) or 32.0,
        beta_slow=rope.take("beta_slow", float) or 1.0,
        truncate=rope.take("truncate", bool, default=True),
        attention_factor=rope.take("attention_factor", float, default=default),
    )
