"""Small safetensors files in versioned formats of this package, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from griffin_jax.utils.messages import brief
from griffin_jax.utils.wholefile import replacing


def save_arrays(
    path: str | os.PathLike[str],
    file_format: str,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file; an existing one is replaced.

    Args:
        path: the file to write.
        file_format: name of the format, with its version.
        arrays: the arrays by name.
        metadata: texts by name, stored in addition to the format.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        with replacing(path) as partial:
            # Serialised in memory, as these files are small: safetensors' own way to a file may leave a temporary one.
            partial.write_bytes(save(dict(arrays), {"format": file_format, **metadata}))
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path} cannot be written: {reason}") from error


def load_arrays(path: str | os.PathLike[str], file_format: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the arrays and the metadata that `save_arrays` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or has another format or version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; it should be one of {file_format!r}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != file_format:
                raise ValueError(f"{path} is not a file of {file_format!r}: its format is {metadata.get('format')!r}")
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, AttributeError, LookupError, TypeError) as error:
        # The last three come from dtypes that NumPy lacks, such as floats of 8 bits.
        raise ValueError(f"{path} is damaged: {brief(error)}") from error
