"""A process that serves requests for long stays as large as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SERVE = """
import json, random, sys, warnings
import griffin_jax as gj
from griffin_jax.utils import memory, programs

folder, warm, requests = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
warnings.simplefilter("ignore")
draw = random.Random(0)
llm = gj.load(folder, "float32")
WORDS = "the bridge was built of iron and river under it is slow long time ago".split()
ODD = 0.08


def text(length):
    return " ".join(draw.choices(WORDS, k=length))


def options():
    # Most requests are alike; some have a density, refit or length that was never there, and compile.
    odd = draw.random() < ODD
    found = {
        "density": round(draw.uniform(0.02, 1), 3) if odd else 0.5,
        "max_new_tokens": draw.randint(1, 40) if odd else 8,
        "ignore_eos": draw.random() < 0.5,
        "seed": draw.randrange(1000),
    }
    if odd and draw.random() < 0.5:
        found |= {"temperature": draw.uniform(0.1, 2), "top_k": draw.randint(1, 300), "top_p": draw.uniform(0.1, 1)}
    if draw.random() < 0.2:
        found["stop"] = text(1)
    if odd and draw.random() < 0.5:
        found["refit"] = draw.randint(1, 40)
    elif odd and draw.random() < 0.3:
        found |= {"speculative": draw.randint(1, 5), "lookup": draw.random() < 0.5}
    elif odd and draw.random() < 0.3:
        found["refresh_every"] = draw.randint(1, 8)
    return found


def request():
    kind = draw.random()
    if kind < 0.15:
        chat = llm.chat(**options())
        for _ in range(draw.randint(1, 3)):
            chat.say(text(2))
    elif kind < 0.25:
        list(llm.stream(text(3), **options()))
    elif kind < 0.3:
        tokens = [[draw.randrange(3, 300) for _ in range(24)]]
        llm.logits(tokens, prompt_length=16, density=0.5).block_until_ready()
    else:
        batch = draw.choice((1, 1, 1, 4))
        found = options()
        if batch > 1 and draw.random() < 0.5 and "speculative" not in found:
            found["shared"] = True
        lengths = [draw.randint(1, 40) if "refit" in found else draw.choice((3, 10)) for _ in range(batch)]
        llm.generate([text(length) for length in lengths], **found)


figures = []
for number in range(requests):
    request()
    if number >= warm and number % 20 == 0 or number == requests - 1:
        figures.append((number, programs.MAPS.read_bytes().count(b"\\n"), memory.resident()))
        if "-v" in sys.argv:
            print(*figures[-1], programs.count(), file=sys.stderr, flush=True)
print(json.dumps(figures))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory maps")
def test_requests_leave_nothing(worded):
    """2,000 requests of all kinds: after 300, maps and resident memory of the first half are those of the second.

    What is allocated is that of the programs that are kept, which differ in size; free pieces between it add to it.
    """
    # Compiled with as little effort as in other tests, but for one device.
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    ran = subprocess.run(
        [sys.executable, "-c", SERVE, str(worded.folder), "300", "2000"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout)
    half = len(figures) // 2
    (maps, resident), (maps_then, resident_then) = (
        [max(figure[part] for figure in some) for part in (1, 2)] for some in (figures[:half], figures[half:])
    )
    print(f"maps {maps:,}, then {maps_then:,}; resident {resident / 1e6:.0f} MB, then {resident_then / 1e6:.0f} MB")
    assert maps_then <= 1.1 * maps
    assert resident_then <= 1.15 * resident
