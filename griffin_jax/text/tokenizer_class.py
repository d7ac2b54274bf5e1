"""The class of transformers that reads a folder's tokenizer.json as AutoTokenizer does.

Most classes take the file as it is. Some, such as LlamaTokenizer, take only vocabulary and merges from it, and split
texts in a way of their own, so that tokens differ. Which class AutoTokenizer takes depends on what the folder's
configurations name, and on lists in its source. It cannot be asked itself, because importing it imports PyTorch, where
that is installed.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from griffin_jax.utils.transformers_import import import_transformers

REGISTERED = "TOKENIZER_MAPPING_NAMES"
"""Transformers' name for its classes by model type."""

MISNAMED = "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS"
"""Transformers' name for its list of model types whose published folders name a wrong class."""

MISTRAL = "MistralCommonBackend"
"""Stands for the class that takes the file as it is, unless there is a file of Mistral's own format, too."""

AS_IT_IS = ("TokenizersBackend", "PythonBackend", "PreTrainedTokenizerFast", MISTRAL)
"""Names that all mean the class that takes the file as it is."""


def class_for(folder: Path) -> Any:
    """The class whose `from_pretrained` reads a folder with a tokenizer.json.

    Raises:
        ValueError: a configuration in the folder is not JSON.
        OSError: it cannot be read.
    """
    transformers = import_transformers()
    tables = _tables()
    if tables is None:
        return transformers.AutoTokenizer
    # Without a config.json AutoTokenizer reads nothing; what `Tokenizer.save` wrote says everything in its file.
    known = (folder / "config.json").is_file()
    name = _name_for(folder, *tables) if known else None
    return _class_of(name) or transformers.PreTrainedTokenizerFast


def _name_for(folder: Path, registered_names: Mapping[str, str | None], misnamed: frozenset[str]) -> str | None:
    """The name of the class, or none for the one that takes the file as it is."""
    config, own = (_values(folder / name) for name in ("config.json", "tokenizer_config.json"))
    said = own.get("tokenizer_class") or config.get("tokenizer_class")
    named = said if isinstance(said, str) else None
    registered = registered_names.get(str(config.get("model_type")))
    if named is None:
        return registered
    if _has_code(own):
        return named
    wrong = not misnamed.isdisjoint({str(config.get("model_type")), str(config.get("model_name"))})
    # Many a vocabulary of bytes is published with this name, and its class knows only those of SentencePiece.
    if _bare(named) == "LlamaTokenizer" and registered != MISTRAL and not wrong and _has_bytes(folder):
        return None
    if registered is None or _bare(registered) == _bare(named):
        return named
    if _bare(registered) in AS_IT_IS:
        return None
    return registered if wrong else named


def _class_of(name: str | None) -> Any | None:
    """A class of transformers by the name that a configuration has for it; None if it takes the file as it is."""
    transformers = import_transformers()
    # The classes of Bloom are no more. A name from somebody else must not import a model.
    if name is None or not _bare(name).endswith("Tokenizer") or _bare(name) == "BloomTokenizer":
        return None
    found = getattr(transformers, name, None) or getattr(transformers, _bare(name), None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedTokenizerBase):
        return None
    return None if found.__name__ in AS_IT_IS else found


def _bare(name: str) -> str:
    return name if name == "PreTrainedTokenizerFast" else name.removesuffix("Fast")


def _has_code(own: Mapping[str, Any]) -> bool:
    """Whether a tokenizer comes with code, which is never run here."""
    classes = own.get("auto_map")
    return bool(classes.get("AutoTokenizer") if isinstance(classes, dict) else classes)


def _has_bytes(folder: Path) -> bool:
    return '"ByteLevel"' in (folder / "tokenizer.json").read_text(encoding="utf-8")


def _values(file: Path) -> dict[str, Any]:
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return values if isinstance(values, dict) else {}


@functools.cache
def _tables() -> tuple[Mapping[str, str | None], frozenset[str]] | None:
    """The names of the classes by model type, and the model types whose folders name a wrong one.

    They are those of the installed transformers; None if its source is not there or has other lists.
    """
    package = importlib.util.find_spec("transformers")
    places = package.submodule_search_locations if package is not None else None
    file = Path(places[0]) / "models" / "auto" / "tokenization_auto.py" if places else None
    if file is None or not file.is_file():
        return None
    found = {}
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and target.id in (REGISTERED, MISNAMED):
                    found[target.id] = _literal(node.value)
    if not found.keys() >= {REGISTERED, MISNAMED}:
        return None
    misnamed = frozenset(found[MISNAMED])
    return dict.fromkeys(misnamed, AS_IT_IS[0]) | dict(found[REGISTERED]), misnamed


class _WithAllPackages(ast.NodeTransformer):
    """Takes what a source has for packages that are installed."""

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        return self.visit(node.body)


def _literal(node: ast.expr) -> Any:
    """The value of a literal, or of what a class is made from."""
    value = node.args[0] if isinstance(node, ast.Call) else node
    return ast.literal_eval(_WithAllPackages().visit(value))
