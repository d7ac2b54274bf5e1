"""`griffin-jax eval drafts`: what drafts needed, against generations made by hand and bytes of real arrays."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import PASSAGES

import griffin_jax as gj
from griffin_jax.cli import main as cli
from griffin_jax.evaluation import drafts
from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.grid import grid
from griffin_jax.evaluation.journal import FILE, Journal
from griffin_jax.extensions.drafter import drafter_of
from griffin_jax.model.weights import WeightFormat, stored_bytes

NEW = 12
ITEMS = [Item("a", list(range(3, 30)), [1]), Item("b", [40, 41, 42, 9, 8, 7, 6, 5] * 3, [1])]
INT4 = WeightFormat.parse("int4:16")
EVERY = drafts.drafters([None, INT4], grid(["topk"], [0.5], ()), {"dense": "-", "topk": "griffin"}, [3])
EVERY += [
    dataclasses.replace(EVERY[-1], drafts=True),
    dataclasses.replace(EVERY[-1], lookup=True),
    dataclasses.replace(drafts.Drafter.parse("lookup"), drafts=3),
]


@pytest.fixture(scope="module")
def scores(primed, tmp_path_factory) -> dict[str, dict]:
    journal = Journal(tmp_path_factory.mktemp("scores"), {})
    return drafts.compare_drafters(primed.llm, ITEMS, EVERY, journal, new=NEW, extensions=gj.Extensions())


def test_what_drafts():
    assert [drafter.name for drafter in EVERY] == [
        "own topk 0.5, 3 drafts",
        "int4:16 dense, 3 drafts",
        "int4:16 topk 0.5, 3 drafts",
        "int4:16 topk 0.5, auto drafts",
        "int4:16+lookup topk 0.5, 3 drafts",
        "lookup, 3 drafts",
    ]


def test_what_is_asked_for():
    assert drafts.Drafter.parse("int4:16@0.5+lookup") == dataclasses.replace(EVERY[-2], drafts=True)
    alone = drafts.Drafter.parse(" lookup")
    assert [each.only_copies for each in (alone, *EVERY[-2:])] == [True, False, True]
    kinds = grid(["topk"], [0.5], ())
    every = drafts.drafters([INT4], kinds, {"dense": "-", "topk": "griffin"}, [True, 3], lookup=True)
    assert [each.name for each in every if each.drafts == 3] == [
        "int4:16 dense, 3 drafts",
        "int4:16 topk 0.5, 3 drafts",
        "int4:16+lookup dense, 3 drafts",
        "int4:16+lookup topk 0.5, 3 drafts",
        "lookup, 3 drafts",
    ]
    assert len(every) == 10


def stored_as(drafter: drafts.Drafter) -> str:
    return "own" if drafter.weights is None else str(drafter.weights)


@pytest.mark.slow
def test_counts_are_those_of_generate(primed, scores):
    for item in ITEMS:
        for drafter in EVERY:
            out = primed.llm.generate(
                [list(item.prompt)], density=drafter.variant.density, speculative=drafter.drafts,
                draft_weights=None if drafter.weights is None else str(drafter.weights), max_new_tokens=NEW,
                ignore_eos=True, lookup=drafter.lookup,
            )  # fmt: skip
            found = scores[item.name][stored_as(drafter)][drafter.name]
            for name in ("passes", "drafted", "accepted", "copied", "copies_accepted"):
                assert found[name] == int(getattr(out.drafting, name).sum())
            assert found["same"] == NEW
            assert found["seconds"] > 0


@pytest.mark.slow
def test_figures_are_what_follows_from_them(primed, scores):
    figures = drafts.figures(scores, EVERY, primed.llm, slots=40, new=NEW, seed=0, extensions=gj.Extensions())
    assert [entry["bytes"]["value"] for entry in figures] == sorted(entry["bytes"]["value"] for entry in figures)
    by_name = {(entry["weights"], entry["density"], entry["drafts"]): entry for entry in figures}
    for drafter in EVERY:
        entry = by_name[drafter.format, drafter.variant.density, drafter.rounds]
        alike = [scores[item.name][stored_as(drafter)][drafter.name] for item in ITEMS]
        passes = sum(found["passes"] for found in alike)
        kept, copies, drafted, copied = (
            sum(found[name] for found in alike) for name in ("accepted", "copies_accepted", "drafted", "copied")
        )
        written = (NEW - 1) * len(ITEMS)
        assert entry["accepted"]["value"] == pytest.approx((kept + copies) / (drafted + copied))
        assert entry["tokens_per_pass"]["value"] == pytest.approx(written / passes)
        read = passes * entry["step_bytes"] + drafted * entry["draft_bytes"]
        assert entry["bytes"]["value"] == pytest.approx(read / entry["step_bytes"] / written)
        assert entry["same"] == 1


@pytest.mark.parametrize("drafter", EVERY, ids=lambda drafter: drafter.name)
def test_bytes_of_a_draft_are_those_of_arrays(primed, drafter):
    model, slots = primed.llm.model, 40

    def read(of: gj.Transformer, looked_up: jax.Array) -> int:
        # Of the table of tokens a step reads one row; a drafter's norms are too little to count.
        leaves = [leaf for leaf in jax.tree.leaves(of) if leaf is not looked_up]
        if of is not model and of.weights == INT4:
            leaves = [leaf for leaf in leaves if leaf.dtype != jnp.float32]
        # However a CPU holds them.
        kinds = ["int4" if of.weights == INT4 and leaf.dtype == jnp.int8 else leaf.dtype for leaf in leaves]
        return sum(stored_bytes(leaf.shape, kind) for leaf, kind in zip(leaves, kinds, strict=True))

    cache = 2 * 2 * 2 * 8 * slots * 4
    row = primed.llm.config.width * 4
    dense = read(model, model.embedding[...]) + row + cache
    own = model if drafter.weights is None else drafter_of(model, drafter.weights)
    if drafter.variant.density < 1:
        own = gj.prune(own, gj.ExpertNeurons.from_indices([range(24)] * 2, model.neurons))
    draft = read(own, own.embedding[...]) + cache + (row if drafter.weights is None else 0)
    draft = 0 if drafter.only_copies else draft
    assert drafts.read_bytes(primed.llm, drafter, slots, gj.Extensions()) == (draft, dense)


def run(capsys, folder: Path, *arguments: object) -> tuple[int, str, str]:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES[:2]), encoding="utf-8")
    lengths = "--prompt-tokens", "16", "--new-tokens", "10", "--output", folder / "out"
    code = cli.main(["eval", "drafts", str(file), *map(str, lengths), *map(str, arguments)])
    return code, *capsys.readouterr()


class TestCommand:
    @pytest.mark.slow
    def test_copies(self, primed, tmp_path, capsys):
        arguments = "--model", primed.folder, "--quality", "griffin", "--density", "0.5", "--draft-weights", "own"
        code, out, err = run(capsys, tmp_path, *arguments, "--lookup", "--plot", tmp_path / "p.png")
        assert code == 0, err
        figures = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
        assert {(entry["weights"], entry["quality"]): entry["draft_bytes"] > 0 for entry in figures} == {
            ("own", "griffin"): True, ("own+lookup", "griffin"): True, ("lookup", "-"): False,
        }  # fmt: skip
        assert "Tokens as the dense model's: at least 100.00%." in out
        assert (tmp_path / "p.png").stat().st_size > 10_000

    @pytest.mark.slow
    def test_all_of_it(self, primed, tmp_path, capsys):
        arguments = (
            "--model", primed.folder, "--draft-weights", "own,int4", "--drafts", "auto,2", "--plot", tmp_path / "p.png"
        )  # fmt: skip
        code, out, _ = run(capsys, tmp_path, *arguments)
        assert code == 0
        figures = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
        kinds = {(entry["weights"], entry["quality"], entry["density"]) for entry in figures}
        # There is a prior, so quality best is compared, too.
        assert kinds == {("own", "griffin", 0.5), ("own", "best", 0.5), ("int4", "-", 1), ("int4", "griffin", 0.5)} | {
            ("int4", "best", 0.5)
        }
        assert "Tokens as the dense model's: at least 100.00%." in out
        assert {entry["drafts"] for entry in figures} == {"auto", "2"}
        assert (tmp_path / "p.png").stat().st_size > 10_000
        before = (tmp_path / "out" / FILE).read_bytes()
        assert run(capsys, tmp_path, *arguments)[0] == 0
        assert (tmp_path / "out" / FILE).read_bytes() == before

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--density", "1", "--draft-weights", "own"), "nothing drafts: give --density below 1"),
            (("--draft-weights", "float32"), "draft_weights are 'float32'; allowed are int8 and int4"),
            (("--drafts", "10"), "--new-tokens must be more than the 10 of --drafts, got 10"),
            (("--drafts", "0"), "--drafts must be a whole number of at least 1, got 0"),
            (("--quality", "good"), "quality must be one of"),
            (("--draft-weights", "int4:24"), "groups of 24 do not divide rows of 32 weights"),
        ],
    )
    def test_errors(self, primed, tmp_path, capsys, arguments, message):
        code, _, err = run(capsys, tmp_path, "--model", primed.folder, *arguments)
        assert code == 2
        assert message in err.splitlines()[-1]
        assert not (tmp_path / "out" / "results.json").exists()
