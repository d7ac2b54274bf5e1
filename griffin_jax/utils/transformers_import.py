"""Imports transformers late and silently: the import takes a second, and prints advice if PyTorch is missing."""

from __future__ import annotations

import os
from types import ModuleType


def import_transformers() -> ModuleType:
    """The transformers package, used for tokenizers and configurations; its models are never used.

    Raises:
        ImportError: transformers is not installed.
    """
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    return transformers
