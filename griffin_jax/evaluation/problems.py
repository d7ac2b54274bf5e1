"""Problems whose answers are right or wrong: HumanEval's functions and GSM8K's numbers, in chat form."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Callable
from decimal import Decimal

from griffin_jax.evaluation.sandbox import Limits, passes

HUMANEVAL, GSM8K = "humaneval", "gsm8k"
COLUMNS = {HUMANEVAL: ("prompt", "test", "entry_point"), GSM8K: ("question", "answer")}
"""Columns of the files in which these are published."""

CODE = "Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{}\n```"
NUMBER = "{}\n\nReason step by step. Write the final answer as a last line of the form: #### NUMBER"

BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
FINAL = re.compile(r"^[ \t]*#### *\$?(-?\d[\d,]*(?:\.\d+)?)[ \t.%]*$", re.MULTILINE)
ANY = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with a verdict.

    Attributes:
        question: what the user says.
        solved: whether an answer is right.
        end: where an answer is complete, so that what follows changes no verdict; None while it is not.
    """

    question: str
    solved: Callable[[str], bool]
    end: Callable[[str], int | None]


def humaneval(prompt: str, test: str, name: str, limits: Limits) -> Problem:
    """A function to complete, which its tests decide about in a process of its own.

    Args:
        prompt: what stands before the function, its head and its docstring.
        test: the text of a function `check(candidate)`.
        name: of the function.
        limits: what a program may use.

    Raises:
        ValueError: the prompt has no function of that name.
    """
    head = re.compile(rf"^[ \t]*def[ \t]+{re.escape(name)}[ \t]*\(", re.MULTILINE)
    heads = list(head.finditer(prompt))
    if not heads:
        raise ValueError("no function entry_point in prompt")
    before = prompt[: heads[-1].start()]

    def program(answer: str) -> str:
        code = code_of(answer, head)
        # A model that answers with the body alone goes on where the prompt ends.
        whole = f"{before}\n{textwrap.dedent(code)}" if head.search(code) else prompt + code
        return f"{whole}\n\n{test}\n\ncheck({name})\n"

    def end(answer: str) -> int | None:
        closed = (b for b in BLOCK.finditer(answer) if b[0].rstrip().endswith("```") and head.search(b[1]))
        return next((block.end() for block in closed), None)

    return Problem(CODE.format(prompt.strip()), lambda answer: passes(program(answer), limits), end)


def code_of(answer: str, head: re.Pattern[str]) -> str:
    """The first block of code with this head; without one the first block, and without any the whole answer."""
    blocks = [block[1] for block in BLOCK.finditer(answer)] or [answer]
    return next((block for block in blocks if head.search(block)), blocks[0])


def gsm8k(question: str, answer: str) -> Problem:
    """A question whose answer is a number.

    Args:
        question: the question.
        answer: a solution, with the number in a last line `#### NUMBER`.

    Raises:
        ValueError: the solution has no such line.
    """
    expected = FINAL.search(answer)
    if expected is None:
        raise ValueError("no line #### NUMBER in answer")
    number = _decimal(expected[1])

    def end(answer: str) -> int | None:
        found = FINAL.search(answer)
        return found.end() if found is not None and found.end() < len(answer) else None

    return Problem(NUMBER.format(question.strip()), lambda answer: number_of(answer) == number, end)


def number_of(answer: str) -> Decimal | None:
    """The number of the first line `#### NUMBER`; without one the last number of the answer, None if it has none."""
    final = FINAL.search(answer)
    found = [final[1]] if final else ANY.findall(answer)
    return _decimal(found[-1]) if found else None


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
