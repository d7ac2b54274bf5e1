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
"""Columns of the files in which the problems of each format are published."""

CODE = "Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{}\n```"
NUMBER = "{}\n\nReason step by step. Write the final answer as a last line of the form: #### NUMBER"

BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
FINAL = re.compile(r"^[ \t]*#### *\$?(-?\d[\d,]*(?:\.\d+)?)[ \t.%]*$", re.MULTILINE)
ANY = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question, and what decides whether an answer is right.

    Attributes:
        question: the user's message.
        solved: returns whether an answer is right.
        end: returns where an answer is complete, so that what follows does not change the verdict; None while it is
            incomplete.
    """

    question: str
    solved: Callable[[str], bool]
    end: Callable[[str], int | None]


def humaneval(prompt: str, test: str, name: str, limits: Limits) -> Problem:
    """A function to complete; tests, which run in a separate process, decide whether it is right.

    Args:
        prompt: what stands before the function, its head and its docstring.
        test: the source of a function `check(candidate)`.
        name: name of the function.
        limits: limits of a program.

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
        # An answer that has only the body continues the prompt.
        whole = f"{before}\n{textwrap.dedent(code)}" if head.search(code) else prompt + code
        return f"{whole}\n\n{test}\n\ncheck({name})\n"

    def end(answer: str) -> int | None:
        closed = (b for b in BLOCK.finditer(answer) if b[0].rstrip().endswith("```") and head.search(b[1]))
        return next((block.end() for block in closed), None)

    return Problem(CODE.format(prompt.strip()), lambda answer: passes(program(answer), limits), end)


def code_of(answer: str, head: re.Pattern[str]) -> str:
    """The first block of code with this head; if there is none, the first block; without blocks, the whole answer."""
    blocks = [block[1] for block in BLOCK.finditer(answer)] or [answer]
    return next((block for block in blocks if head.search(block)), blocks[0])


def gsm8k(question: str, answer: str) -> Problem:
    """A question whose answer is a number.

    Args:
        question: the question.
        answer: a solution, with the number in a last line of the form `#### NUMBER`.

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
    """The number of the first line `#### NUMBER`; without such a line, the answer's last number; None without any."""
    final = FINAL.search(answer)
    found = [final[1]] if final else ANY.findall(answer)
    return _decimal(found[-1]) if found else None


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))
