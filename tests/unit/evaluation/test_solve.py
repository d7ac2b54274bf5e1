"""`griffin-jax eval solve`: verdicts on programs and numbers, answers against `generate`, figures against sums."""

from __future__ import annotations

import json
import math

import pytest
from conftest import PASSAGES

from griffin_jax.cli import main as cli
from griffin_jax.evaluation import front, problems, solve
from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.drafts import Drafter
from griffin_jax.evaluation.grid import grid
from griffin_jax.evaluation.journal import FILE, Journal
from griffin_jax.evaluation.problems import Problem
from griffin_jax.evaluation.sandbox import Limits, check_sandbox, passes
from griffin_jax.extensions.mixed import MixedFormat
from griffin_jax.model.weights import WeightFormat

PROMPT = 'from math import floor\n\n\ndef twice(x: int) -> int:\n    """Twice x.\n    """\n'
TEST = "def check(candidate):\n    assert candidate(3) == 6\n"
ROWS = grid(["topk"], [0.5], ())
FORMATS = [WeightFormat.parse("float32")]


class TestPrograms:
    @pytest.mark.parametrize(
        ("program", "expected"),
        [
            ("import random, re, hashlib; open('here', 'w').write('x')", True),
            ("if __name__ == '__main__': raise SystemExit", True),
            ("assert False", False),
            ("raise SystemExit(0)", False),
            ("import os; os._exit(0)", False),
            ("while True: pass", False),
            ("x = bytearray(300 << 20)", False),
            ("import socket", False),
            ("import subprocess", False),
            ("import os; os.system('true')", False),
            ("import os; os.fork()", False),
            ("import ctypes", False),
            ("import numpy", False),
            ("def", False),
        ],
    )
    def test_only_what_ends_by_itself_passes(self, program, expected):
        assert passes(program, Limits(1, 200)) == expected

    def test_files_elsewhere_are_left_alone(self, tmp_path):
        file = tmp_path / "file"
        file.write_text("as it was")
        for change in (f"open({str(file)!r}, 'w')", f"import os; os.remove({str(file)!r})"):
            assert not passes(change)
        assert file.read_text() == "as it was"

    def test_limits(self):
        with pytest.raises(ValueError, match="seconds must be a whole number of at least 1, got 0"):
            Limits(0)
        with pytest.raises(ValueError, match="no program runs in 1 s and 1 MB"):
            check_sandbox(Limits(1, 1))


class TestHumanEval:
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (f"So:\n```python\n{PROMPT}    return floor(2 * x)\n```\nDone.", True),
            ("```python\ndef twice(x):\n    return floor(x) + x\n```", True),
            ("```\nprint(twice(1))\n```\n```py\ndef twice(x):\n    return 2 * x\n```", True),
            ("1. Like this:\n   ```python\n   def twice(x):\n       return 2 * x\n   ```", True),
            ("```python\n    return 2 * x\n```", True),
            ("def twice(x):\n    return 2 * x", True),
            ("```python\ndef twice(x):\n    return 2 * x", True),
            ("```python\ndef twice(x):\n    return x\n```\n```python\ndef twice(x):\n    return 2 * x\n```", False),
            ("```python\ndef twice(x):\n    return 2 * x\nexit(0)\n```", False),
            ("It is twice as much.", False),
            ("", False),
        ],
    )
    def test_answers(self, answer, expected):
        problem = problems.humaneval(PROMPT, TEST, "twice", Limits())
        assert problem.solved(answer) == expected
        assert problem.solved(answer[: problem.end(answer)]) == expected

    def test_it_ends_with_the_block_that_has_the_function(self):
        problem = problems.humaneval(PROMPT, TEST, "twice", Limits())
        answer = "```\n1\n```\n```python\ndef twice(x):\n    return 2 * x\n```"
        assert problem.end(answer[:-1]) is None
        assert problem.end(answer + "\nmore") == len(answer)
        assert PROMPT.strip() in problem.question

    def test_a_prompt_without_the_function(self):
        with pytest.raises(ValueError, match="no function entry_point in prompt"):
            problems.humaneval("def other(): pass", TEST, "twice", Limits())


class TestGsm8k:
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ("5 and 3 make\n#### 1,008", True),
            ("#### $1008.00\nOr 7.", True),
            ("So it is 1008 dollars.", True),
            ("#### 1. Count\nThere are 1008", True),
            ("#### 7\n#### 1008", False),
            ("1008 or 7", False),
            ("-1008", False),
            ("none", False),
        ],
    )
    def test_answers(self, answer, expected):
        problem = problems.gsm8k("How many?", "8 + 1,000 = 1,008\n#### 1,008")
        assert problem.solved(answer) == expected
        assert problem.solved(answer[: problem.end(answer)]) == expected

    def test_it_ends_after_the_final_line(self):
        problem = problems.gsm8k("How many?", "#### 10")
        assert problem.end("#### 1") is None
        assert problem.end("#### 10\nMore") == 7

    def test_a_solution_without_number(self):
        with pytest.raises(ValueError, match="no line #### NUMBER in answer"):
            problems.gsm8k("How many?", "10")


class TestAnswers:
    @pytest.mark.thorough
    def test_they_are_what_generate_writes_and_go_on_after_an_interruption(self, primed, tmp_path):
        llm = primed.llm
        items = [Item(str(number), llm.tokenizer.encode(text[:60])) for number, text in enumerate(PASSAGES[:3])]

        def end(text: str) -> int | None:
            return text.index("o") if "o" in text else None

        asked = {item.name: Problem("", lambda text: len(text) % 2 == 0, end) for item in items}

        def run() -> dict:
            journal = Journal(tmp_path, {})
            return solve.solve(llm, items, asked, ROWS, FORMATS, journal, new=12, size=2, seed=0)

        found = run()
        texts = [found["float32"][item.name] for item in items]
        for item, verdicts in zip(items, texts, strict=True):
            for name, density in (("dense", 1.0), ("topk 0.5", 0.5)):
                text = llm.generate([list(item.prompt)], max_new_tokens=12, density=density).texts[0]
                text = text[: end(text)]
                assert verdicts[name] == {"text": text, "solved": len(text) % 2 == 0}
        lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
        assert len(lines) == 1 + len(FORMATS) * len(items)
        (tmp_path / FILE).write_text("".join(lines[:3]))
        assert run() == found

    @pytest.mark.slow
    def test_what_joins_is_answered_and_what_is_there_is_not(self, primed, tmp_path):
        items = [Item(str(number), primed.llm.tokenizer.encode(text[:60])) for number, text in enumerate(PASSAGES[:3])]
        asked = {item.name: Problem("", lambda text: True, lambda text: None) for item in items}

        def run(some: list[Item], densities: list[float], formats: list[front.Format]) -> dict:
            rows = grid(["topk"], densities, ())
            return solve.solve(
                primed.llm, some, asked, rows, formats, Journal(tmp_path, {}), new=6, size=2, seed=0
            )  # fmt: skip

        run(items[:1], [0.5], FORMATS)
        file = tmp_path / FILE
        file.write_text(file.read_text().replace('"solved": true', '"solved": "before"'))
        more = [*FORMATS, MixedFormat.parse("float32+int4:16")]
        found = run(items, [0.5, 0.25], more)
        verdicts = {
            (weights, name, variant): answer["solved"]
            for weights, texts in found.items()
            for name, answers in texts.items()
            for variant, answer in answers.items()
        }
        assert len(verdicts) == 3 * (3 + 2)
        before = {entry for entry, solved in verdicts.items() if solved == "before"}
        assert before == {("float32", "0", "dense"), ("float32", "0", "topk 0.5")}
        lines = file.read_text()
        assert run(items, [0.25], more) == found
        assert file.read_text() == lines

    @pytest.mark.slow
    def test_of_two_formats_by_bytes_they_are_those_of_generate(self, primed, tmp_path):
        llm, two = primed.llm, MixedFormat.parse("float32+int4:16")
        items = [Item(str(number), llm.tokenizer.encode(text[:60])) for number, text in enumerate(PASSAGES[:2])]
        asked = {item.name: Problem("", lambda text: len(text) % 2 == 0, lambda text: None) for item in items}
        variants = grid(["topk"], [0.5, 0.1], ())
        found = solve.solve(llm, items, asked, variants, [*FORMATS, two], Journal(tmp_path, {}), new=12, size=2, seed=0)
        for item in items:
            assert found[str(two)][item.name].keys() == {"topk 0.5", "topk 0.1"}
            for density in (0.5, 0.1):
                out = llm.generate([list(item.prompt)], max_new_tokens=12, density=density, mixed_weights="int4:16")
                assert found[str(two)][item.name][f"topk {density}"]["text"] == out.texts[0]
        sizes = {(str(each), variant): 10**6 for each, variant in front.compared([*FORMATS, two], variants)}
        rows = solve.figures(found, variants, {"dense": "-", "topk": "griffin"}, sizes, seed=0)
        assert [(row["weights"], row["density"]) for row in rows] == [
            ("float32", 1), ("float32", 0.5), ("float32", 0.1), (str(two), 0.5), (str(two), 0.1),
        ]  # fmt: skip

    @pytest.mark.slow
    def test_with_a_drafter_they_are_the_dense_models(self, primed, tmp_path):
        llm = primed.llm
        items = [Item(str(number), llm.tokenizer.encode(text[:60])) for number, text in enumerate(PASSAGES[:2])]
        asked = {item.name: Problem("", lambda text: len(text) % 2 == 0, lambda text: 5) for item in items}
        pair = FORMATS[0], Drafter.parse("int4:16@0.5")
        (found,) = solve.solve_drafted(llm, items, asked, [pair], Journal(tmp_path, {}), new=12).values()
        for item in items:
            dense = llm.generate([list(item.prompt)], max_new_tokens=12, density=1.0)
            drafted = llm.generate(
                [list(item.prompt)], max_new_tokens=12, density=0.5, speculative=True, draft_weights="int4:16"
            )
            answer = found[item.name]
            assert answer["text"] == dense.texts[0][:5]
            assert answer["solved"] == (len(answer["text"]) % 2 == 0)
            assert answer["tokens"] == len(dense.tokens[0])
            assert answer["passes"] == int(drafted.drafting.passes)
        again = solve.solve_drafted(None, items, asked, [pair], Journal(tmp_path, {}), new=12)  # pyright: ignore
        assert list(again.values()) == [found]

    def test_figures(self):
        dense, pruned = [True, True, True, False, False, True], [True, False, False, True, False, True]
        scores = {
            "float32": {
                str(number): {"dense": {"solved": one}, "topk 0.5": {"solved": other}}
                for number, (one, other) in enumerate(zip(dense, pruned, strict=True))
            }
        }
        sizes = {("float32", variant): 10**6 for variant in ROWS}
        first, second = solve.figures(scores, ROWS, {"dense": "-", "topk": "griffin"}, sizes, seed=0)
        assert (first["solved"], first["kept"]["value"], first["p"]) == (4, 1.0, 1.0)
        assert (second["solved"], second["lost"], second["gained"], second["problems"]) == (3, 2, 1, 6)
        assert second["share"]["value"] == 0.5
        assert second["kept"]["value"] == 0.5
        assert second["kept"]["low"] < 0.5 < second["kept"]["high"]
        pair = FORMATS[0], Drafter.parse("int4:16@0.5")
        answers = {name: text["dense"] for name, text in scores["float32"].items()}
        rows = solve.figures(scores, ROWS, {"dense": "-", "topk": "griffin"}, sizes, 0, {pair: (answers, 600_000.0)})
        drafted = rows[2]
        assert (drafted["weights"], drafted["quality"]) == ("float32 (int4:16 drafts)", "drafted")
        assert (drafted["solved"], drafted["lost"], drafted["bytes_per_token"]) == (4, 0, 600_000.0)
        assert max(map(len, solve.table(rows).splitlines())) <= 120

    @pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (2, 9), (5, 5), (7, 3)])
    def test_mcnemar_is_a_sum_of_binomials(self, lost, gained):
        number = lost + gained
        tail = sum(math.comb(number, k) for k in range(min(lost, gained) + 1)) / 2**number
        assert solve.mcnemar(lost, gained) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


class TestCommand:
    @pytest.mark.thorough
    def test_gsm8k(self, primed, tmp_path, capsys):
        records = [{"question": f"How many are {n} and 1?", "answer": f"#### {n + 1}"} for n in range(2)]
        records += [{"question": "How many?", "answer": "none"}, {"question": "x" * 300, "answer": "#### 1"}]
        file = tmp_path / "t.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        arguments = [
            "eval", "solve", str(file), "--format", "gsm8k", "--model", str(primed.folder), "--new-tokens", "9",
            "--density", "0.5", "--quality", "griffin", "--weights", "int8", "--output", str(tmp_path / "out"),
            "--plot", str(tmp_path / "p.png"), "--json", "--drafters",
        ]  # fmt: skip
        code = cli.main([*arguments, "int8@0.5"])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert "no line #### NUMBER in answer: t.jsonl, line 3" in err
        assert "longer than the model's context of 256: t.jsonl, line 4" in err
        result = json.loads(out.splitlines()[-1])
        assert result == json.loads((tmp_path / "out" / "results.json").read_text())
        rows = [(f["weights"], f["quality"], f["density"], f["problems"]) for f in result["figures"]]
        assert rows == [
            ("float32", "-", 1.0, 2),
            ("float32", "griffin", 0.5, 2),
            ("float32 (int8 drafts)", "drafted", 0.5, 2),
            ("int8", "-", 1.0, 2),
            ("int8", "griffin", 0.5, 2),
        ]
        assert result["figures"][2]["bytes_per_token"] > 0

        # One density and some drafters more: what is there stays.
        before = (tmp_path / "out" / FILE).read_text()
        arguments[arguments.index("0.5")] = "0.5,0.25"
        assert cli.main([*arguments, "int8@0.5,int8@0.5+lookup,lookup"]) == 0
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
        assert [f["weights"] for f in figures if f["quality"] == "drafted"] == [
            "float32 (int8 drafts)", "float32 (int8+lookup drafts)", "float32 (lookup drafts)", "int8 (lookup drafts)",
        ]  # fmt: skip
        assert (tmp_path / "out" / FILE).read_text().startswith(before)
        assert (tmp_path / "p.png").stat().st_size > 10_000

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--format", "humaneval"], "runs programs that the model writes: allow it with --run-code"),
            (["--format", "humaneval", "--run-code", "--megabytes", "1"], "no program runs in 10 s and 1 MB"),
            (["--format", "gsm8k", "--seconds", "0"], "seconds must be a whole number of at least 1, got 0"),
            (["--format", "gsm8k", "--new-tokens", "0"], "--new-tokens must be a whole number of at least 1, got 0"),
            (["--format", "gsm8k", "--weights", "int5"], "int5"),
            (
                ["--format", "gsm8k", "--weights", "float32+int8", "--density", "1"],
                "float32+int8 is what densities below 1 count bytes of: give one, or a part that is precise",
            ),
            (["--format", "gsm8k", "--drafters", "int4"], "a drafter is a format with a density, such as int4@0.5"),
            (["--format", "gsm8k"], "no text can be used (1 x no column 'question')"),
        ],
    )
    def test_bad_input(self, primed, tmp_path, capsys, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "t.jsonl").write_text('{"text": "x"}\n')
        assert cli.main(["eval", "solve", "t.jsonl", "--model", str(primed.folder), *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err.splitlines()[-1]
        assert not (tmp_path / "eval-solve").exists()
