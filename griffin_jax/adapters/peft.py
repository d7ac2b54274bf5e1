"""Reads and writes adapters in the format of PEFT (https://github.com/huggingface/peft): JSON and safetensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError
from safetensors.flax import load_file
from safetensors.numpy import save

from griffin_jax.adapters.adapter import Adapter, Factors
from griffin_jax.adapters.config import scale_of
from griffin_jax.adapters.modules import modules_of
from griffin_jax.model.config import ModelConfig
from griffin_jax.utils.messages import brief, shortened
from griffin_jax.utils.wholefile import hidden_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

READ = ("peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights")
"""Entries of a configuration that say how the tensors are meant."""

STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations of A and B that do not change the model's own weights; others, such as PiSSA, do."""

IGNORED = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
"""Entries that only say how the adapter was trained, or repeat what the names of the tensors say."""

DEFAULTS: Mapping[str, Any] = {"bias": "none"}
"""Values that further entries may have. An entry that is not listed here may only be null, false or empty."""


def load_adapter(folder: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """Load an adapter for a model, as float32.

    Args:
        folder: folder with adapter_config.json and adapter_model.safetensors.
        config: configuration of the model.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the files are damaged, for another model, or for anything other than plain LoRA.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: there is no {name}, as PEFT's adapters have (in safetensors, no pickles)"
            )
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG}: is no JSON ({brief(error)})") from error
    rank, scale = _read_config(values, str(folder / CONFIG))
    try:
        tensors: Mapping[str, Array] = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / WEIGHTS}: is damaged ({brief(error)})") from error
    adapter = _from_tensors(tensors, rank, scale, str(folder / WEIGHTS))
    try:
        adapter.check(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return adapter


def save_adapter(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    config: ModelConfig,
    base: str = "",
    notes: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write an adapter so that PEFT can load it; the folder appears whole or not at all.

    Args:
        adapter: a single adapter with the same rank in all layers.
        folder: folder to write; it must not exist yet.
        config: configuration of the model that the adapter is for.
        base: name or path of that model, for people and for PEFT's own loader.
        notes: contents of further text files, by name.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists already.
        OSError: the folder cannot be written.
        ValueError: the adapter is for another model, is a stack, or has different ranks in different layers or rank 0.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already; choose another place or delete it first")
    adapter.check(config)
    if adapter.stacked is not None:
        raise ValueError(f"these are {adapter.stacked} adapters in one; save them one by one, see unstack")
    ranks = {factors.a.shape[0] for factors in adapter.factors.values()}
    if len(ranks) != 1 or 0 in ranks:
        raise ValueError(f"PEFT's format has one rank of at least 1 for all layers, this adapter has {sorted(ranks)}")
    (rank,) = ranks
    modules = modules_of(config)
    kinds = sorted({modules[name].kind for name in adapter.factors})
    everywhere = {name for name, module in modules.items() if module.kind in kinds} == adapter.factors.keys()
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(modules[name].stored_transposed for name in adapter.factors),
        "inference_mode": True,
        "target_modules": kinds if everywhere else sorted(adapter.factors),
    }
    tensors = {}
    for name, factors in sorted(adapter.factors.items()):
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(factors.a)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(factors.b)
    with hidden_folder(folder) as partial:
        (partial / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (partial / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        for name, text in notes.items():
            (partial / name).write_text(text, encoding="utf-8")
        os.rename(partial, folder)
    return folder


def _read_config(values: Any, where: str) -> tuple[int, float]:
    """The rank and the scale that a configuration gives.

    Raises:
        ValueError: an entry is not supported, so the adapter would not compute what it did in PEFT.
    """
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else values
        raise ValueError(f"{where}: peft_type is {kind!r}; only LORA is supported")
    others = {name: value for name, value in values.items() if name not in READ + IGNORED}
    if unknown := {n: v for n, v in others.items() if v != DEFAULTS.get(n) and v not in (None, False, "", [], {})}:
        said = shortened([f"{name}={value!r}" for name, value in unknown.items()], 9)
        raise ValueError(f"{where}: has what is not supported: {said}; in PEFT merge it into its model, and save that")
    if values.get("init_lora_weights") not in STARTS:
        raise ValueError(
            f"{where}: init_lora_weights is {values['init_lora_weights']!r}, so the model's own weights were changed,"
            " too; in PEFT save it with path_initial_model_for_weight_conversion, or merge it into its model"
        )
    rank, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"{where}: r is {rank!r} and lora_alpha {alpha!r}; they must be numbers, r at least 1")
    return rank, scale_of(alpha, rank, bool(values.get("use_rslora")))


def _from_tensors(tensors: Mapping[str, Array], rank: int, scale: float, where: str) -> Adapter:
    pairs: dict[str, dict[str, Array]] = {}
    for name, tensor in tensors.items():
        found = NAME.fullmatch(name)
        if found is None or tensor.ndim != 2:
            raise ValueError(f"{where}: tensor {name} of the shape {tensor.shape} is no factor of a linear layer")
        if not bool(jnp.isfinite(tensor).all()):
            raise ValueError(f"{where}: tensor {name} has values that are not finite")
        pairs.setdefault(found["module"], {})[found["factor"]] = tensor.astype(jnp.float32)
    if not pairs:
        raise ValueError(f"{where}: has no tensors")
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or not pair["A"].shape[0] == pair["B"].shape[1] == rank:
            shapes = {f"lora_{factor}": tensor.shape for factor, tensor in pair.items()}
            raise ValueError(f"{where}: {module} has {shapes}, not two factors of rank {rank}")
    return Adapter({name: Factors(pair["A"], pair["B"]) for name, pair in pairs.items()}, scale)
