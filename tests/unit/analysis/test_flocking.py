"""Flocking as NumPy and sets of numbers have it, and the command that draws it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LLAMA_LIKE, build_torch
from conftest import first_and_slow
from reference import TinyLlama, assert_close, oracle_squares, oracle_topk, torch_greedy, torch_intermediates
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import griffin_jax as gj
from griffin_jax.analysis import flocking, flocking_report
from griffin_jax.cli.main import main
from griffin_jax.evaluation.batches import Item
from griffin_jax.generation import jitted

PROMPT, NEW, WINDOW, DENSITIES = 12, 8, 4, (0.25, 0.5)


def similarity_of_sets(first, second) -> float:
    first, second = set(map(int, first)), set(map(int, second))
    return len(first & second) / len(first | second)


def experts(squares: np.ndarray, density: float) -> np.ndarray:
    return oracle_topk(squares, int(len(squares) * density))


def relative(z: np.ndarray) -> np.ndarray:
    return np.abs(z) / np.linalg.norm(z, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, 101, length).tolist() for length in (20, 30, 25)]


@pytest.fixture(scope="module")
def worded(tmp_path_factory, texts) -> TinyLlama:
    """A tiny model whose words are w0 to w100, and which writes less than a window behind the first text."""
    folder = tmp_path_factory.mktemp("worded")
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(101)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    end = torch_greedy(TinyLlama.build(folder).torch, texts[0][:PROMPT], WINDOW - 1)[-1]
    return TinyLlama.build(folder, eos_token_id=end)


class TestSimilarity:
    def test_pairs_are_those_of_sets(self, rng):
        masks = rng.random((5, 40)) < 0.4
        sets = [np.flatnonzero(mask) for mask in masks]
        expected = [[similarity_of_sets(a, b) for a in sets] for b in sets]
        pairs = flocking.jaccard_of_pairs(jnp.asarray(masks))
        np.testing.assert_allclose(pairs, expected, rtol=1e-6)
        different = [similarity_of_sets(a, b) for a, b in itertools.combinations(sets, 2)]
        np.testing.assert_allclose(flocking.mean_of_pairs(pairs), np.mean(different), rtol=1e-6)
        np.testing.assert_allclose(
            flocking.jaccard(jnp.asarray(masks[:4]), jnp.asarray(masks[1:])), np.diagonal(expected, 1), rtol=1e-6
        )

    @pytest.mark.parametrize(("kept", "neurons"), [(1, 5), (3, 7), (6, 7), (4, 4)])
    def test_random_experts_as_counted(self, kept, neurons):
        first = range(kept)
        every = itertools.combinations(range(neurons), kept)
        expected = np.mean([similarity_of_sets(first, second) for second in every])
        assert flocking.expected_jaccard(kept, neurons) == pytest.approx(expected)

    def test_random_experts_of_many_neurons(self):
        assert flocking.expected_jaccard(6912, 13824) == pytest.approx(1 / 3, abs=1e-4)


class TestReadings:
    def test_activations_are_those_of_torch(self, tiny, texts):
        tokens, lengths = gj.pad(texts, 32)
        found = flocking.activations(tiny.llm.model, jnp.asarray(tokens), jnp.asarray(lengths), (1, 0), 40)
        for row, text in enumerate(texts):
            z = torch_intermediates(tiny.torch, text)
            for array, layer in zip(found, (1, 0), strict=True):
                assert_close(np.asarray(array[row, : len(text)]), relative(z[layer])[:, :40])

    def test_windows_are_parts_of_the_text(self, tiny, texts):
        """Also where a text ends within a window or before one."""
        ends = [PROMPT + NEW, PROMPT + 5, PROMPT + 3]
        tokens, lengths = gj.pad([text[:PROMPT] for text in texts], 16)
        answers = np.full((3, NEW), gj.EMPTY, np.int32)
        for row, (text, end) in enumerate(zip(texts, ends, strict=True)):
            answers[row, : end - PROMPT] = text[PROMPT:end]
        prefilled = jitted.prefill(tiny.llm.model, tokens, lengths, max_new_tokens=16)
        windows = np.asarray(flocking.window_statistics(tiny.llm.model, prefilled, jnp.asarray(answers), WINDOW))
        assert windows.shape == (2, 3, NEW // WINDOW, 48)
        for row, (text, end) in enumerate(zip(texts, ends, strict=True)):
            for layer, z in enumerate(torch_intermediates(tiny.torch, text[:end])):
                for number, start in enumerate(range(PROMPT, PROMPT + NEW, WINDOW)):
                    expected = oracle_squares(z[start : start + WINDOW])
                    np.testing.assert_allclose(windows[layer, row, number], expected, rtol=1e-4, atol=1e-6)


class TestExperts:
    """Three experts of eight neurons, of which each text reaches some, and shared ones of six."""

    RANGES, CONFIG = (8, 8, 8, 6), gj.GriffinConfig(0.5)

    @pytest.fixture
    def squares(self, rng) -> np.ndarray:
        found = rng.random((4, 30)).astype(np.float32)
        found[0, :8] = found[1, 8:16] = found[2, :24] = found[3, :16] = 0
        return found

    def of_sets(self, first: np.ndarray, second: np.ndarray) -> float:
        found, weights = [], []
        ends = np.cumsum(self.RANGES)
        for a, b in zip(np.split(first, ends[:-1]), np.split(second, ends[:-1]), strict=True):
            found.append(similarity_of_sets(experts(a, 0.5), experts(b, 0.5)))
            weights.append(min(a.sum(), b.sum()))
        return np.average(found, weights=weights)

    def test_each_counts_by_its_tokens(self, squares):
        pairs = [(squares[a], squares[b]) for a, b in itertools.combinations(range(4), 2)]
        expected = [self.of_sets(*pair) for pair in pairs]
        assert len(set(expected)) > 3
        first, second = (jnp.stack(each) for each in zip(*pairs, strict=True))
        found = flocking.similarities(first, second, (self.CONFIG,), self.RANGES)
        np.testing.assert_allclose(found[0], expected, rtol=1e-6)
        (mean,) = flocking.similarity(jnp.asarray(squares), (self.CONFIG,), self.RANGES)
        np.testing.assert_allclose(mean, np.mean(expected), rtol=1e-6)

    def test_without_a_common_expert(self, squares):
        """Nothing can be compared, unless there are others, of which the mean is."""
        first, second = jnp.asarray(squares[[0, 2], :24])
        ranges = self.RANGES[:3]
        assert np.isnan(flocking.similarities(first, second, (self.CONFIG,), ranges)).all()
        three = jnp.asarray(squares[[0, 2, 3], :24])
        of_two = flocking.similarities(three[0], three[2], (self.CONFIG,), ranges)
        np.testing.assert_allclose(flocking.similarity(three, (self.CONFIG,), ranges), of_two, rtol=1e-6)


class TestPrompts:
    @pytest.mark.parametrize("lead", [0, 2])
    def test_permuting_keeps_the_tokens_and_what_stands_in_front(self, lead):
        item = Item("a", list(range(50)), [1, 2], "summary")
        other = flocking.permuted(item, lead, np.random.default_rng(0))
        assert sorted(other.prompt) == item.prompt != other.prompt
        assert list(other.prompt[:lead]) == item.prompt[:lead]
        assert (other.name, other.answer, other.reference) == (item.name, item.answer, item.reference)

    def test_random_tokens_are_of_the_whole_vocabulary(self):
        other = flocking.random_tokens(Item("a", [90, *[0] * 999]), 1, 7, np.random.default_rng(0))
        assert len(other.prompt) == 1000
        assert other.prompt[0] == 90
        assert set(other.prompt[1:]) == set(range(7))

    @pytest.mark.parametrize("kind", [flocking.PERMUTED, flocking.RANDOM])
    def test_draws_belong_to_text_and_seed(self, kind, texts):
        items = [Item(str(number), text) for number, text in enumerate(texts)]
        both = flocking.Texts(items, 0, 101).of_kind(kind, 3)
        assert flocking.Texts(items[1:], 0, 101).of_kind(kind, 3) == both[1:]
        assert flocking.Texts(items, 0, 101).of_kind(kind, 4) != both


def command(folder: Path, *arguments: str) -> int:
    lengths = ["--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW), "--window", str(WINDOW)]
    densities = ["--density", "0.5", "--densities", "0.25"]
    return main(["flocking", "--output", str(folder), *lengths, *densities, "--batch", "2", *arguments])


def written(texts: list[list[int]]) -> list[str]:
    return [" ".join(f"w{token}" for token in text) for text in texts]


def test_files_of_one_name_are_not_mixed_up(worded, texts, tmp_path, capsys):
    """Texts are told apart by the names of their files."""
    files = [tmp_path / name / "texts.jsonl" for name in ("news", "code")]
    for file, text in zip(files, written(texts), strict=False):
        file.parent.mkdir()
        file.write_text(json.dumps({"text": text}) + "\n")
    assert command(tmp_path / "out", *map(str, files), "--model", str(worded.folder)) == 2
    assert "two have the same: " in capsys.readouterr().err


@pytest.mark.thorough
@pytest.mark.parametrize("continuation", first_and_slow(1, "own", "text"))
def test_numbers_are_those_of_numpy(worded, texts, tmp_path, capsys, continuation):
    """From a file to JSON, against torch's intermediates; the third text is alone in its batch.

    What the model writes behind the first text ends within a window, which then does not count.
    """
    lines = [json.dumps({"body": f"A w1 {text} B"}) for text in written(texts)]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join([lines[0], "{", json.dumps({"body": "w1"}), *lines[1:]]))
    marks = ["--column", "body", "--after", "w1 ", "--before", " B", "--continuation", continuation]
    assert command(tmp_path / "out", str(file), "--model", str(worded.folder), *marks, "--json") == 0
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert results == json.loads((tmp_path / "out" / "flocking.json").read_text())
    assert (results["used"], results["left_out"]["count"], results["kept"]) == (3, 2, [12, 24])
    assert "not JSON" in err
    assert f"{file.name}, line 3" in err

    items = [Item(f"{file.name}, line {line}", text[:PROMPT]) for line, text in zip((1, 4, 5), texts, strict=True)]
    prompts, follows, permutations = [], [], []
    for text, other in zip(texts, flocking.Texts(items, 0, 101).of_kind(flocking.PERMUTED, 0), strict=True):
        answer = text[PROMPT : PROMPT + NEW]
        if continuation == "own":
            answer = torch_greedy(worded.torch, text[:PROMPT], NEW)
            end = worded.torch.config.eos_token_id
            answer = answer[: answer.index(end) + 1] if end in answer else answer
        z = torch_intermediates(worded.torch, text[:PROMPT] + answer)
        prompts.append([oracle_squares(layer[:PROMPT]) for layer in z])
        ends = range(PROMPT + WINDOW, len(z[0]) + 1, WINDOW)
        follows.append([[oracle_squares(layer[end - WINDOW : end]) for end in ends] for layer in z])
        permutations.append(list(map(oracle_squares, torch_intermediates(worded.torch, list(other.prompt)))))

    def mean(pairs, density: float) -> float:
        return float(np.mean([similarity_of_sets(experts(a, density), experts(b, density)) for a, b in pairs]))

    stability = results["stability"]
    reached = [[row for row in range(3) if len(follows[row][0]) > window] for window in range(NEW // WINDOW)]
    assert stability["texts"] == list(map(len, reached))
    assert (0 in reached[0]) == (continuation == "text")
    for (at, density), layer in itertools.product(enumerate(DENSITIES), range(2)):
        own, other = ([squares[layer] for squares in kind] for kind in (prompts, permutations))
        found = {kind: values[at][layer] for kind, values in results["similarity"].items()}
        found["own"] = results["own_permutation"][at][layer]
        expected = {
            "texts": mean(itertools.combinations(own, 2), density),
            "permuted": mean(itertools.combinations(other, 2), density),
            "random_tokens": found["random_tokens"],
            "own": mean(zip(own, other, strict=True), density),
        }
        assert found == pytest.approx(expected, rel=1e-5)
        for window, rows in enumerate(reached):
            windows = {row: follows[row][layer][window] for row in rows}
            so_far = {row: np.sum(follows[row][layer][: window + 1], axis=0) for row in rows}
            expected = {
                "windows": mean([(own[row], windows[row]) for row in rows], density),
                "so_far": mean([(own[row], so_far[row]) for row in rows], density),
                "other_windows": mean([(own[row - 1], windows[row]) for row in rows if row], density),
                "other_so_far": mean([(own[row - 1], so_far[row]) for row in rows if row], density),
            }
            found = {key: stability[key][at][layer][window] for key in expected}
            assert found == pytest.approx(expected, rel=1e-5)
    with np.load(tmp_path / "out" / "activations.npz") as maps:
        assert set(maps) == {f"text {text}, layer {layer}" for text in (1, 2) for layer in range(2)}
        z = torch_intermediates(worded.torch, texts[1])
        assert_close(maps["text 2, layer 1"], relative(z[1]))


def test_reports_of_texts_that_end_at_once(tmp_path):
    """There is nothing to draw, and no warning."""
    results = {
        "model_name": "m", "dtype": "float32", "used": 2, "left_out": {"count": 0}, "layers": 1, "prompt": 4,
        "continuation": "own", "window": 2, "density": 0.5, "densities": [0.5], "kept": [2], "neurons": 4,
        "random_experts": [0.4], "similarity": {key: [[0.6]] for key in flocking_report.KINDS},
        "own_permutation": [[0.7]],
        "stability": {"texts": [0], **{key: [[[None]]] for key in flocking_report.STABILITY}},
    }  # fmt: skip
    lines = flocking_report.table(results).splitlines()
    assert lines[4].split()[2:] == ["0.600", *["0.600", "(in", "0)"] * 2]
    assert lines[8].split()[-3:] == ["-"] * 3
    flocking_report.plot_stability(results, tmp_path / "stability.png")
    assert (tmp_path / "stability.png").stat().st_size


def test_text_files_and_chosen_pictures(worded, texts, tmp_path, capsys):
    files = [tmp_path / f"{number}.txt" for number in range(4)]
    for file, text in zip(files, written([*texts, texts[0]]), strict=True):
        file.write_text(text)
    arguments = ["--model", str(worded.folder), "--layer", "1", "--text", "3", "--limit", "3"]
    assert command(tmp_path / "out", *map(str, files), *arguments) == 0
    assert "3 texts of 12 tokens, 0 left out" in capsys.readouterr().out
    for name in ("activations", "similarity", "stability"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with np.load(tmp_path / "out" / "activations.npz") as maps:
        assert {name: maps[name].shape for name in maps} == {"text 3, layer 1": (25, 48)}


@pytest.mark.slow
def test_routed_experts_next_to_a_dense_layer(texts, tmp_path, capsys):
    """Layers differ in their neurons; a dense one has no experts."""
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(101)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "model")
    attributes = {"mlp_only_layers": [0], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    build_torch("qwen3_moe", {**LLAMA_LIKE, **attributes}, tmp_path / "model")
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in written(texts)))
    arguments = [str(file), "--model", str(tmp_path / "model"), "--layer", "0,1", "--continuation", "text", "--json"]
    assert command(tmp_path / "out", *arguments) == 0
    out = capsys.readouterr().out
    assert "experts are 12 of 24 neurons of each routed expert (density 0.5)" in out
    results = json.loads(out.splitlines()[-1])
    llm = gj.load(tmp_path / "model", "float32")
    prompts = [jitted.prefill(llm.model, *gj.pad([text[:PROMPT]], 16), max_new_tokens=0) for text in texts]
    squares = [[np.asarray(layer[0]) for layer in prompt.statistics.squares] for prompt in prompts]
    dense = [experts(layers[0], 0.5) for layers in squares]
    routed = [layers[1].reshape(4, 24) for layers in squares]
    expected = [
        [similarity_of_sets(*pair) for pair in itertools.combinations(dense, 2)],
        [
            np.average(
                [similarity_of_sets(experts(a, 0.5), experts(b, 0.5)) for a, b in zip(first, second, strict=True)],
                weights=np.minimum(first.sum(axis=1), second.sum(axis=1)),
            )
            for first, second in itertools.combinations(routed, 2)
        ],
    ]
    assert results["similarity"]["texts"][1] == pytest.approx(np.mean(expected, axis=1), rel=1e-5)


@pytest.mark.slow
def test_devices_find_what_one_does(worded, texts, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in written(texts)))
    found = []
    for name, mesh in (("one", []), ("four", ["--mesh", "data=2,model=2"])):
        arguments = [str(file), "--model", str(worded.folder), *mesh]
        assert command(tmp_path / name, *arguments) == 0, capsys.readouterr().err
        found.append(json.loads((tmp_path / name / "flocking.json").read_text()))
    (one, structure), (four, other) = map(jax.tree.flatten, found)
    assert other == structure
    assert four == [pytest.approx(x, rel=1e-5) if isinstance(x, float) else x for x in one]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "3"], "--new-tokens must be whole windows of 3, got 8"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--density", "1.5"], "density must be in (0, 1], got 1.5"),
        (["--densities", "a"], "--densities: 'a' is no list of numbers"),
        (["--densities", "0.01"], "density 0.01 keeps 0 of 48 neurons"),
        (["--layer", "3"], "--layer: the model's layers are 0 to 1, got 3"),
        (["--text", "0"], "--text: 3 texts can be used, numbered from 1, got 0"),
        (["--text", "4"], "--text: 3 texts can be used, numbered from 1, got 4"),
        (["--limit", "1"], "line 1 can be used; similarity needs two texts or more"),
        (["--prompt-tokens", "100"], "no text can be used (3 x shorter than 100 tokens)"),
        (["--prompt-tokens", "250"], "250 + 8 tokens are more than the model's context of 256"),
        (["--column", "body"], "no text can be used (3 x no column 'body')"),
        (["--output", "no/such"], "--output: there is no folder"),
        (["no.txt"], "there is no file no.txt"),
    ],
)  # fmt: skip
def test_bad_input(worded, texts, tmp_path, capsys, arguments, message):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in written(texts)))
    assert command(tmp_path / "out", str(file), *arguments, "--model", str(worded.folder)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
