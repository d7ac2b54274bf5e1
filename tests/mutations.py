"""Mutations of small files that keep their structure: `python mutations.py FOLDER CASES SEED`.

Every case changes one to three values somewhere in a file: a number becomes negative, huge or NaN, a value a list, a
name another's. What may come out is a model, or an error of a documented type in one line, within `SECONDS` and
`MEMORY`.
"""

from __future__ import annotations

import copy
import json
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
from checkpoints_gguf import write_gguf
from safetensors.numpy import save_file

from griffin_jax.checkpoints.families import families
from griffin_jax.checkpoints.gguf import read_gguf_tokenizer
from griffin_jax.checkpoints.loading import convert, open_source
from griffin_jax.checkpoints.native import MANIFEST, sealed
from griffin_jax.evaluation.journal import Journal
from griffin_jax.extensions.prior import PRIOR_FORMAT, Prior
from griffin_jax.griffin.neurons import EXPERTS_FORMAT, ExpertNeurons
from griffin_jax.utils.transformers_import import import_transformers

SECONDS = 20
MEMORY = 2 << 30
"""That a case may take beyond what the process has before the first."""

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 1e308, -1e308, 1e-320, 0.5,
    float("nan"), float("inf"), "", "x", "\0", "\ud800", "x" * 5000, "../x", "F8_E4M3", "yarn", [], {}, [1], [[]], [{}],
    {"a": 1}, ["x"] * 3, [-1, 3], [2**70], [None], [0.5], {"rope_type": "yarn"}, {"": []},
)  # fmt: skip

NUMBERS: tuple[tuple[str, list[Any]], ...] = (
    ("<I", [0, 1, 2, 3, 2**31, 2**32 - 1]), ("<Q", [0, 1, 33, 2**32, 2**63, 2**64 - 1]),
    ("<f", [0, -1, np.nan, np.inf, 1e-40]), ("B", [0, 255, 4, 8, 9]),
)  # fmt: skip
"""What is written over a part of a GGUF file, by its code in `struct`."""

Random = np.random.Generator


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree of dictionaries and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:50]) if isinstance(value, list) else ()
    return [*([path] if path else []), *(place for key, item in inner for place in places(item, (*path, key)))]


def mutated(value: Any, random: Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(int(random.integers(1, 4))):
        found = places(value)
        if not found:
            break
        *path, key = found[int(random.integers(len(found)))]
        parent = value
        for step in path:
            parent = parent[step]
        old = parent[key]
        how = int(random.integers(7))
        if how < 3:
            parent[key] = copy.deepcopy(STRANGE[int(random.integers(len(STRANGE)))])
        elif how == 3 and isinstance(old, int | float) and not isinstance(old, bool):
            parent[key] = [-old, old + 1, old * 1000, float(old), old - 1][int(random.integers(5))]
        elif how == 4:
            del parent[key]
        elif how == 5 and isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        else:
            other = value
            for step in found[int(random.integers(len(found)))]:
                if not isinstance(other, dict | list) or (isinstance(other, dict) and step not in other):
                    break
                if isinstance(other, list) and not (isinstance(step, int) and step < len(other)):
                    break
                other = other[step]
            parent[key] = copy.deepcopy(other)
    return value


def text_of(value: Any) -> bytes:
    return json.dumps(value).encode()


class Fuzzer:
    """Small files of every kind, and for each kind a way to change and to open it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.kinds: dict[str, Callable[[Random], Any]] = {
            name.removeprefix("case_"): getattr(self, name) for name in dir(self) if name.startswith("case_")
        }
        self.hf = checkpoints.write(folder / "hf")
        self.raw = (self.hf / "model.safetensors").read_bytes()
        self.gguf = write_gguf(folder / "x.gguf", checkpoints.tensors()).read_bytes()
        self.sharded = checkpoints.write(folder / "sharded", shards=3)
        self.native = convert(self.hf, folder / "native", progress=False).path
        self.manifest = json.loads((self.native / MANIFEST).read_text())
        self.index = json.loads((self.sharded / "model.safetensors.index.json").read_text())
        self.tokenizer = json.loads(TOKENIZER)
        self.worded = checkpoints.write(folder / "worded")
        self.defaults = {
            name: {**import_transformers().AutoConfig.for_model(name).to_dict(), "model_type": name}
            for name in families()
        }

    def case_config(self, random: Random) -> Any:
        (self.hf / "model.safetensors").write_bytes(self.raw)
        (self.hf / "config.json").write_bytes(text_of(mutated(checkpoints.CONFIG, random)))
        return self.read(self.hf)

    def case_families(self, random: Random) -> Any:
        name = sorted(self.defaults)[int(random.integers(len(self.defaults)))]
        return families()[name].model_config(mutated(self.defaults[name], random), "config.json")

    def case_safetensors(self, random: Random) -> Any:
        (self.hf / "config.json").write_bytes(text_of(checkpoints.CONFIG))
        (size,) = struct.unpack("<Q", self.raw[:8])
        header = text_of(mutated(json.loads(self.raw[8 : 8 + size]), random))
        (self.hf / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + self.raw[8 + size :])
        return self.read(self.hf)

    def case_index(self, random: Random) -> Any:
        (self.sharded / "model.safetensors.index.json").write_bytes(text_of(mutated(self.index, random)))
        return self.read(self.sharded)

    def case_gguf(self, random: Random) -> Any:
        raw = bytearray(self.gguf)
        names = [at for at in range(4000) if raw.startswith((b"llama.", b"general.", b"blk.", b"token", b"output"), at)]
        for _ in range(int(random.integers(1, 3))):
            at = names[int(random.integers(len(names)))] + int(random.integers(-8, 60))
            code, values = NUMBERS[int(random.integers(len(NUMBERS)))]
            struct.pack_into(code, raw, at, values[int(random.integers(len(values)))])
        (self.folder / "x.gguf").write_bytes(raw)
        return self.read(self.folder / "x.gguf")

    def case_gguf_vocabulary(self, random: Random) -> Any:
        kind = ("llama", "gpt2")[int(random.integers(2))]
        tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ", "▁"]
        fields = {"model": kind, "tokens": tokens, "scores": [0.0] * 8, "merges": ["a b"], "pre": "default",
                  "token_type": [2, 3, 3, 1, 1, 1, 1, 1], "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
                  "add_bos_token": True}  # fmt: skip
        changed = {f"tokenizer.ggml.{name}": value for name, value in mutated(fields, random).items()}
        return read_gguf_tokenizer(changed, "x.gguf")

    def case_native(self, random: Random) -> Any:
        manifest = mutated(self.manifest, random)
        (self.native / MANIFEST).write_bytes(text_of(sealed(manifest) if random.integers(5) else manifest))
        return open_source(self.native)

    def case_tokenizer(self, random: Random) -> Any:
        (self.worded / "tokenizer.json").write_bytes(text_of(mutated(self.tokenizer, random)))
        found = open_source(self.worded).tokenizer()
        return None if found is None else found.encode("ab a")

    def case_experts(self, random: Random) -> Any:
        arrays = {"layers.0": np.array([0, 2], np.int32), "layers.1": np.array([1, 3], np.int32)}
        return self.arrays(random, EXPERTS_FORMAT, arrays, {"neurons": "4 4", "groups": "1"}, ExpertNeurons.load)

    def case_prior(self, random: Random) -> Any:
        arrays = {f"layers.{layer}.squares": np.ones(4, np.float32) for layer in range(2)}
        metadata = {"layers": "2", "strength": "0.0", "model": "x", "tokens": "7", "uniform": ""}
        return self.arrays(random, PRIOR_FORMAT, arrays, metadata, Prior.load)

    def arrays(
        self, random: Random, kind: str, arrays: dict[str, np.ndarray], metadata: dict[str, str], load: Callable
    ) -> Any:
        file = self.folder / "arrays.safetensors"
        save_file(arrays, file, {"format": kind, **metadata})
        raw = file.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header = text_of(mutated(json.loads(raw[8 : 8 + size]), random))
        file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size :])
        return load(file)

    def case_scores(self, random: Random) -> Any:
        folder = self.folder / "scores"
        folder.mkdir(exist_ok=True)
        lines = [{"settings": {"a": 1}}, {"text": "x", "scores": [1.0]}, {"text": "y", "scores": [2.0]}]
        content = b"\n".join(text_of(mutated(line, random)) for line in lines) + b"\n"
        (folder / "scores.jsonl").write_bytes(content)
        return Journal(folder, {"a": 1})

    def read(self, path: Path) -> Any:
        source = open_source(path)
        found = [source.read(name, np.dtype(np.float32)) for name in source.shapes]
        assert all(np.isfinite(array).all() for array in found)
        source.tokenizer()
        return source


TOKENIZER = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [{"id": 0, "content": "<s>",
"single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}], "normalizer": null,
"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence":
{"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
"special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}, "decoder": {"type": "ByteLevel"}, "model":
{"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
"fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
"vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3,
"\\u0120": 4},
"merges": [["a", "b"]]}}"""


def too_long(number: int, frame: object) -> None:
    raise AssertionError(f"it took more than {SECONDS} s")


def outcome(case: Callable[[Random], Any], random: Random) -> bool:
    """Whether a case was refused.

    Raises:
        AssertionError: it took too long, or its message is not one line of a reasonable length.
    """
    signal.alarm(SECONDS)
    try:
        case(random)
    except (ValueError, OSError, MemoryError) as error:
        message = str(error)
    else:
        return False
    finally:
        signal.alarm(0)
    assert len(message.splitlines()) == 1, f"a message of several lines: {message!r:.300}"
    assert len(message) < 8000, f"a message of {len(message)} characters"
    return True


def main(folder: Path, cases: int, seed: int, *only: str) -> None:
    fuzzer = Fuzzer(folder)
    kinds = list(only) or sorted(fuzzer.kinds)
    signal.signal(signal.SIGALRM, too_long)
    for kind in kinds:  # what is imported and compiled once does not count
        outcome(fuzzer.kinds[kind], np.random.default_rng(0))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmSize"].split()[0]) * 1024 + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    refused = 0
    failures: dict[str, str] = {}
    for number in range(cases):
        # Native folders take the time of hundreds of others.
        kind = kinds[number % len(kinds)]
        if kind == "native" and not only and number % 5:
            kind = "families"
        try:
            refused += outcome(fuzzer.kinds[kind], np.random.default_rng((seed, number)))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{kind} {type(error).__name__} {last.filename}:{last.lineno}"
            failures.setdefault(where, f"{where}, case {number} of seed {seed}: {str(error)[:300]}")
    shutil.rmtree(folder, ignore_errors=True)
    print(*failures.values(), sep="\n", file=sys.stderr)
    print(cases, refused, len(failures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
