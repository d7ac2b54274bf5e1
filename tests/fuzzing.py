"""Damaged checkpoints, opened and read in a process with bounded memory: `python fuzzing.py KIND FOLDER`.

Every case is a file written anew, opened and read whole. What may come out is the model that the file
describes, or a ValueError or FileNotFoundError that names the file or its folder. The process ends with
a traceback at the first case with another outcome; `FOLDER/case` then still has the files.
"""

from __future__ import annotations

import copy
import json
import math
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
from checkpoints_gguf import write_gguf

from griffin_jax.checkpoints.loading import open_source

MEMORY = 1 << 30
"""That a case may take beyond what the process has before the first of them."""
SECONDS = 30
"""That a case may take."""

HUGE = (1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8)
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e308, -1e308, 0.5, float("nan"), float("inf"), "", "x",
    "\0", "\ud800", "F32", "silu", [], {}, [1], [[]], {"a": 1}, ["x"] * 3, [-1, 3], [2**70], [0.5],
    {"rope_type": "yarn"},
)  # fmt: skip

Case = tuple[str, Callable[[], None]]


def outcome(path: Path) -> dict[str, np.ndarray] | str:
    """All parameters of a model, or the message with which it is refused."""
    try:
        source = open_source(path)
        return {name: source.read(name, np.dtype(np.float32)) for name in source.shapes}
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        # repr, because a message may quote a name that is no valid text.
        assert str(path) in message, f"the message does not name the file: {message!r}"
        return message


def check(path: Path, expected: Callable[[], dict[str, np.ndarray] | None]) -> bool:
    """Runs one case; whether the model was refused."""
    start = time.monotonic()
    found = outcome(path)
    assert time.monotonic() - start < SECONDS, "it took too long"
    if isinstance(found, str):
        return True
    assert all(np.isfinite(array).all() for array in found.values())
    tensors = expected()
    if tensors is not None:
        for name, tensor in (("embedding", "model.embed_tokens.weight"), ("norm.scale", "model.norm.weight")):
            np.testing.assert_array_equal(found[name], tensors[tensor])
        down = tensors["model.layers.1.mlp.down_proj.weight"]
        np.testing.assert_array_equal(found["layers.1.ff.down"], down.T)
    return False


def damaged_bytes(raw: bytes, size: int, boundaries: list[int], random: np.random.Generator) -> Iterator[bytes]:
    """A file with the first `size` bytes (its header) changed in many ways, and cut at every boundary."""
    for boundary in boundaries:
        for keep in (boundary - 1, boundary, boundary + 1):
            yield raw[: max(keep, 0)]
    for position in range(size):
        changed = bytearray(raw)
        changed[position] ^= 1 << int(random.integers(8))
        yield bytes(changed)
    for _ in range(size // 3):
        at, many = int(random.integers(size)), int(random.integers(1, 9))
        yield raw[:at] + random.bytes(many) + raw[at:]
        yield raw[:at] + raw[at + many :]
        yield raw[:at] + random.bytes(many) + raw[at + many :]
        source = int(random.integers(size))
        yield raw[:at] + raw[source : source + 8 * many] + raw[at + 8 * many :]


# ---- safetensors ----


def parse(raw: bytes) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as its header has them, without any check."""
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    kinds = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in kinds:
            start, stop = entry["data_offsets"]
            values = np.frombuffer(raw[8 + size + start : 8 + size + stop], kinds[entry["dtype"]])
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def pack(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edited_headers(header: dict[str, Any], random: np.random.Generator) -> Iterator[bytes | dict[str, Any]]:
    """The header of a safetensors file with whole values replaced."""
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        start, stop = header[name]["data_offsets"]
        other = header[names[int(random.integers(len(names)))]]["data_offsets"]
        for offsets in (
            [stop, start], [start, start], [start, stop + 4], [start - 4, stop], [start + 4, stop + 4], other,
            [0, stop], [-1, stop], [start, 2**63], [2**64 - 4, 2**64], [start], [start, stop, stop],
            [start + 0.5, stop], "x", None,
        ):  # fmt: skip
            yield {**header, name: {**header[name], "data_offsets": offsets}}
        for shape in (
            [], [0], [-1, 4], [2**32, 2**32], [2**62, 4], [2**64], [10**30], header[name]["shape"][::-1], [1.5],
            ["x"], None, [*header[name]["shape"], 1], [1, *header[name]["shape"]], [math.prod(header[name]["shape"])],
            [1] * 300,
        ):  # fmt: skip
            yield {**header, name: {**header[name], "shape": shape}}
        for dtype in ("F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32", "", "\0", None, 7, []):
            yield {**header, name: {**header[name], "dtype": dtype}}
        yield {key: value for key, value in header.items() if key != name}
        for value in (None, 7, "x", [], {}, {"dtype": "F32"}, {**header[name], "more": 1}):
            yield {**header, name: value}
        for new in ("", "\0", "\ud800", "../" + name, name + " ", name.upper(), "__metadata__", "x" * 100_000):
            yield {new if key == name else key: value for key, value in header.items()}
    text = json.dumps(header).encode()
    first = json.dumps({names[0]: header[names[0]]}).encode()[1:-1]
    yield text[:-1] + b"," + first + b"}"
    yield text.replace(b'"dtype"', b'"dtype": "I8", "dtype"', 1)
    for depth in (100, 1000, 100_000):
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            yield text[:-1] + b', "deep": ' + opening * depth + b"1" + closing * depth + b"}"
            yield opening * depth
            yield text[:-1] + b', "__metadata__": {"a": ' + opening * depth + b"1" + closing * depth + b"}}"
    yield from (b"", b"{}", b"[]", b"null", b"7", b'"x"', b"{", b"\xff\xfe{}", text[:-1], text + b"}", b" " * 1000)
    yield text.replace(b"weight", b"wei\xffht")
    yield text.replace(b"weight", b"wei\\ud800ht")
    yield text.replace(b"0", b"1" * 5000, 1)
    yield text[:-1] + b', "n": ' + b"9" * 10_000 + b"}"


def safetensors_cases(folder: Path) -> Iterator[tuple[str, bytes]]:
    random = np.random.default_rng(0)
    raw = (checkpoints.write(folder) / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    boundaries = [0, 4, 8, 8 + size, *(8 + size + entry["data_offsets"][1] for entry in header.values())]
    for length in (*HUGE, size - 1, size + 1, size - 8, size + 8, len(raw), len(raw) - 8, 0):
        yield f"header length {length}", struct.pack("<Q", length) + raw[8:]
    for number, text in enumerate(edited_headers(header, random)):
        yield f"edited header {number}", pack(text, data)
    for number, changed in enumerate(damaged_bytes(raw, 8 + size, boundaries, random)):
        if number % 3 == 0:  # so many are alike
            yield f"damaged bytes {number}", changed


def fuzz_safetensors(folder: Path) -> Iterator[tuple[str, bool]]:
    for name, content in safetensors_cases(folder):
        (folder / "model.safetensors").write_bytes(content)
        yield name, check(folder, lambda content=content: parse(content))


# ---- JSON files beside the weights ----


def edited(value: Any, random: np.random.Generator) -> Iterator[Any]:
    """A JSON object with every value in it replaced by strange ones, left out, or renamed."""
    for name in value:
        for strange in STRANGE:
            yield {**value, name: strange}
        yield {key: kept for key, kept in value.items() if key != name}
        yield {f"{key}x" if key == name else key: kept for key, kept in value.items()}
        if isinstance(value[name], int):
            for step in (-1, 1, 7):
                yield {**value, name: value[name] + step}
    for _ in range(60):
        both = copy.deepcopy(value)
        for name in random.choice(list(value), 2):
            both[name] = STRANGE[int(random.integers(len(STRANGE)))]
        yield both


def json_cases(value: Any, random: np.random.Generator) -> Iterator[bytes]:
    yield from (json.dumps(changed).encode() for changed in edited(value, random))
    text = json.dumps(value).encode()
    for depth in (1000, 100_000):
        yield b"[" * depth
        yield text[:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + b"}"
    yield from (text.replace(b'"', b"\xff", 1), text.replace(b"1", b"9" * 5000, 1), b"\xef\xbb\xbf" + text, b"\0" * 64)
    for position in range(0, len(text), 5):
        changed = bytearray(text)
        changed[position] ^= 1 << int(random.integers(8))
        yield bytes(changed)
        yield text[:position]


def fuzz_config(folder: Path) -> Iterator[tuple[str, bool]]:
    random = np.random.default_rng(0)
    checkpoints.write(folder)
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 32}  # fmt: skip
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0}
    for scaling in (None, scaled, yarn):
        values = checkpoints.config(rope_scaling=scaling)
        for number, content in enumerate(json_cases(values, random)):
            if "rope_scaling" in values and number % 8:
                continue
            (folder / "config.json").write_bytes(content)
            yield f"config {number}: {content[:300]!r}", check(folder, lambda: None)
        for inner in edited(values.get("rope_scaling", {}), random) if "rope_scaling" in values else ():
            (folder / "config.json").write_text(json.dumps({**values, "rope_scaling": inner}))
            yield f"rope_scaling {inner!r:.300}", check(folder, lambda: None)


def fuzz_index(folder: Path) -> Iterator[tuple[str, bool]]:
    random = np.random.default_rng(0)
    weights = checkpoints.tensors()
    checkpoints.write(folder, weights, shards=3)
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    cases = [json.dumps({**value, "weight_map": inner}).encode() for inner in edited(value["weight_map"], random)]
    for number, content in enumerate([*cases, *json_cases(value, random)]):
        if number % 2:
            index.write_bytes(content)
            yield f"index {number}: {content[:300]!r}", check(folder, lambda: weights)


# ---- GGUF ----


def fuzz_gguf(folder: Path) -> Iterator[tuple[str, bool]]:
    random = np.random.default_rng(0)
    file = folder / "x.gguf"
    weights = checkpoints.tensors()
    more = (
        lambda writer: writer.add_array("tokenizer.ggml.unknown", ["a", "bc", "def"]),
        lambda writer: writer.add_token_types([1] * 20),
        lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(3, np.float32)),
    )
    raw = write_gguf(file, weights, extra=more).read_bytes()
    size = len(raw) - sum(array.nbytes for array in weights.values()) - 512
    interesting = [at for at in range(size) if raw.startswith((b"llama", b"token", b"gener", b"blk.", b"output"), at)]
    for number, changed in enumerate(damaged_bytes(raw, size, [0, 4, 8, 16, 24, *interesting, size, len(raw)], random)):
        file.write_bytes(changed)
        # The file has no check sum: what a changed number says about a tensor's place or dtype may be as good.
        yield f"damaged bytes {number}", check(file, lambda: None)
    counts = [8, 16, *(at - 8 for at in interesting)]
    for at in counts:
        for value in HUGE:
            file.write_bytes(raw[:at] + struct.pack("<Q", value) + raw[at + 8 :])
            yield f"{value} at {at}", check(file, lambda: None)
    start = raw[:8] + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 1) + b"k"
    for depth in (10, 1000, 100_000):
        for count in (1, 2**40, 2**64 - 1):
            file.write_bytes(start + struct.pack("<I", 9) + struct.pack("<IQ", 9, count) * depth + bytes(32))
            yield f"arrays nested {depth} times", check(file, lambda: None)
    for kind in range(14):
        for count in (0, 1, *HUGE):
            for rest in (0, 64, 4096):
                file.write_bytes(start + struct.pack("<IIQ", 9, kind, count) + bytes(rest))
                yield f"{count} elements of type {kind}", check(file, lambda: None)
    for kind in range(64):
        name = b"rope_freqs.weight"
        at = raw.index(name) + len(name)
        for shape in (0, 3, 32, 2**40):
            file.write_bytes(raw[: at + 4] + struct.pack("<QI", shape, kind) + raw[at + 16 :])
            yield f"rotary factors of shape {shape} and type {kind}", check(file, lambda: None)


def main(kind: str, folder: Path) -> None:
    case = folder / "case"
    case.mkdir()
    # What is imported and compiled once does not count.
    outcome(checkpoints.write(folder / "warm"))
    outcome(checkpoints.write(folder / "warm", config=checkpoints.config(unknown=1)))
    outcome(write_gguf(folder / "warm.gguf", checkpoints.tensors()))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used = int(status["VmSize"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    number = refused = 0
    name = "none"
    try:
        for name, one in globals()[f"fuzz_{kind}"](case):
            number, refused, last = number + 1, refused + one, name
    except BaseException:
        print(f"case {number + 1}, the one behind: {last}", file=sys.stderr)
        raise
    print(number, refused)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
