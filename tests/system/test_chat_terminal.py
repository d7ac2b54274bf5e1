"""A chat in a real terminal, as a person has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from signals import AS_IN_A_TERMINAL

fdpexpect = pytest.importorskip("pexpect.fdpexpect")
termios = pytest.importorskip("termios")

SLOWLY = f"""{AS_IN_A_TERMINAL}
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from griffin_jax.cli.main import main
from griffin_jax.llm.llm import LLM

write_more = LLM._write_more
def slowly(*arguments):
    time.sleep(0.5)
    return write_more(*arguments)
LLM._write_more = slowly
sys.exit(main(["chat", *sys.argv[1:]]))
"""
"""In the terminal that stdin is, and so that there is time to interrupt an answer of a tiny model."""

PROMPT = r">( |\x08\x1b\[2C)"
ANSWER = r"\x1b\[\?2004l[^\x1b]"
"""The end of a line that is read, and the beginning of what is written."""

INTERRUPT, END = "\x03", "\x04"


def environment(tmp_path) -> dict[str, str]:
    return {**os.environ, "GRIFFIN_JAX_CACHE": str(tmp_path / "cache"), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}


def send_line(chat, text: str) -> None:
    chat.send(f"{text}\r")


@pytest.mark.thorough
def test_a_conversation(worded, tmp_path):
    # pexpect itself would fork, which is not safe in a process that runs JAX.
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, "--model", str(worded.folder), "--max-new-tokens", "24"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment(tmp_path), start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    chat = fdpexpect.fdspawn(ours, encoding="utf-8", timeout=120)
    chat.expect("density 0.5 .*Ctrl-C stops an answer")
    chat.expect(PROMPT)
    send_line(chat, "The river is slow.")
    chat.expect(r"(\d+) of (\d+) tokens read, \d+ written")
    assert chat.match[1] == chat.match[2]
    chat.expect(PROMPT)

    send_line(chat, "/density 0.25")
    chat.expect(r"\[density 0\.25\]")
    chat.expect(PROMPT)
    send_line(chat, "And the bridge?")
    chat.expect(r"(\d+) of (\d+) tokens read")
    assert int(chat.match[1]) < int(chat.match[2])
    chat.expect(PROMPT)

    # Ctrl-C stops an answer, and not the chat.
    send_line(chat, "It was built of iron.")
    chat.expect(ANSWER)
    chat.send(INTERRUPT)
    chat.expect(r"\[stopped\]")
    chat.expect(PROMPT)
    chat.send("half a line")
    chat.send(INTERRUPT)
    chat.expect(PROMPT)

    send_line(chat, "/dense")
    chat.expect(r"\[dense\]")
    send_line(chat, "A long time ago.")
    chat.expect("tokens read")
    send_line(chat, "/stats")
    chat.expect("prefill s")
    chat.expect(r" 50%")
    chat.expect(r" 25%")
    chat.expect(r"stopped")
    chat.expect(r" 100%")
    send_line(chat, f"/save {tmp_path}/here.json")
    chat.expect("saved 8 messages")
    send_line(chat, "/nothing")
    chat.expect(r"there is no command /nothing; /help lists them")
    chat.expect(PROMPT)
    chat.send(END)
    assert process.wait(60) == 0
    chat.close()


@pytest.mark.slow
def test_from_a_pipe(worded, tmp_path):
    """Without a terminal: a message for each line, and nothing but answers and what commands say."""
    saved = tmp_path / "chat.json"
    lines = f"The river is slow.\n\n/density 2\n/save {saved}\nAnd the bridge?\n/save {saved}\n/quit\nnot read\n"
    done = subprocess.run(
        [sys.executable, "-m", "griffin_jax.cli.main", "chat", "--model", str(worded.folder),
         "--max-new-tokens", "6", "--system", "Be brief."],
        input=lines, env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    first, second = (message["content"] for message in messages[2::2])
    refused = "density must be in (0, 1], got 2.0"
    assert done.stdout.startswith(f"{first}\n[{refused}")
    assert f"[saved 3 messages to {saved}]\n{second}\n[saved 5 messages" in done.stdout
