"""Which attributes of a config.json transformers looks at, found in its source.

A published configuration often has attributes that no code reads: left over from an older version, or from the tools
that trained the model. They change nothing, and which ones there are cannot be listed in advance. So the source of the
family's model in the installed transformers is searched for the name.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

from griffin_jax.utils.transformers_import import import_transformers

SHARED = ("activations", "cache_utils", "masking_utils", "modeling_layers", "modeling_rope_utils")
"""Modules that compute for models of every family, and are given their configurations."""


CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
"""Transformers' name for its list of causal language models."""


def read_by_transformers(model_type: str) -> frozenset[str] | None:
    """Every name that transformers' code for a model type reads from any object, or has as a string.

    That is more than the attributes it reads: a name that is not among them is certainly not read. None if the
    installed transformers has no such model, or no source.
    """
    folder = _source_folder()
    if folder is None:
        return None
    files = _files_of(folder, model_type)
    if not any(file.name.startswith("modeling_") for file in files):
        return None
    return frozenset().union(*map(_names_in, [*files, *(folder / f"{name}.py" for name in SHARED)]))


def _files_of(folder: Path, model_type: str) -> list[Path]:
    """The source of a model and its configuration; of a configuration that another type's model is for, of both."""
    kinds = causal_models()
    alike = [other for other, name in kinds.items() if name == kinds.get(model_type)]
    modules = [folder / "models" / _module_of(kind) for kind in dict.fromkeys([model_type, *alike])]
    # Files that write checkpoints anew, or prepare text and images, are not part of the model.
    own = [*modules[0].glob("modeling_*.py"), *modules[0].glob("configuration_*.py")]
    if any(file.name.startswith("modeling_") for file in own):
        return own
    return own + [file for module in modules[1:] for file in module.glob("modeling_*.py")]


@functools.cache
def causal_models() -> Mapping[str, str]:
    """The class of every causal language model of the installed transformers, by model type; empty without it.

    It is read from the source: the module itself needs PyTorch.
    """
    folder = _source_folder()
    if folder is None:
        return {}
    tree = ast.parse((folder / "models" / "auto" / "modeling_auto.py").read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == CAUSAL for target in targets):
                return {kind: str(name) for kind, name in ast.literal_eval(node.value.args[0])}
    return {}


def read_of_rope_parameters() -> frozenset[str] | None:
    """The same of `rope_scaling` and `rope_parameters`, which are read in one place."""
    folder = _source_folder()
    return None if folder is None else _names_in(folder / "modeling_rope_utils.py")


def _source_folder() -> Path | None:
    found = importlib.util.find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0])
    return folder if (folder / "modeling_rope_utils.py").is_file() else None


def _module_of(model_type: str) -> str:
    """The folder of a model type, which several may share: `gemma3` for `gemma3_text`."""
    mapping = import_transformers().models.auto.configuration_auto
    return mapping.model_type_to_module_name(model_type)


@functools.cache
def _names_in(file: Path) -> frozenset[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError):
        return frozenset()
    return frozenset(_names(tree))


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        # getattr(config, "name"), parameters["name"], maps of names
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        # A configuration class may take an argument and keep it under another name.
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        # rope_parameters.get(name) after validation by keyword
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
