"""What all tests share: shape and type checks of every public signature, tiny models, the demo model."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# A command that runs in this process would keep every later test's programs in the user's folder.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# Most of the time of these tests is that of compiling tiny models. These flags choose how XLA's instructions become
# machine code: it runs slower, by less than they save. (With its older way of emitting fusions and one LLVM module for
# each program, XLA of jaxlib 0.10 compiles in less than half of the time.) XLA's own passes, which tests look at, stay
# as they are. Whoever sets XLA_FLAGS tests with what XLA does by default.
# The processor counts as eight devices, of which all but the tests of meshes use the first.
DEVICES = 8
CODE = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Later versions end the process over flags that they do not know.
    CODE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", f"{CODE} --xla_force_host_platform_device_count={DEVICES}")

from jaxtyping import install_import_hook

# The modules whose arguments users check with a ValueError (config, sampling, llm) stay unhooked: there a wrong type is
# theirs to refuse.
HOOKED = [
    "analysis.flocking",
    "analysis.experts.choices", "analysis.experts.components", "analysis.experts.matching", "analysis.experts.routers",
    "analysis.experts.similarity",
    "extensions.prior", "extensions.promise", "extensions.reconstruction", "extensions.refresh",
    "extensions.speculative", "extensions.trial",
    "generation.decode", "generation.padding", "generation.prefill", "generation.scoring",
    "griffin.masked", "griffin.neurons", "griffin.prune", "griffin.select", "griffin.statistic",
    "model.attention", "model.cache", "model.feed_forward", "model.norm", "model.ops", "model.positions",
    "model.transformer",
]  # fmt: skip
with install_import_hook([f"griffin_jax.{name}" for name in HOOKED], "beartype.beartype"):
    import griffin_jax as gj

    # The package loads its modules when they are used, which would be without the hook.
    for name in HOOKED:
        importlib.import_module(f"griffin_jax.{name}")

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from reference import TinyLlama, load_torch, tiny_tokenizer
from xdist.scheduler import LoadScopeScheduling

from griffin_jax.utils import programs as kept_programs

if importlib.util.find_spec("torch") is None:
    # Pickle files are torch's, and lm-evaluation-harness imports it. Other tests of it are skipped one by one.
    collect_ignore = ["unit/checkpoints/test_pickle.py", "unit/evaluation/test_harness.py"]

PASSAGES = [
    "A lighthouse keeper writes down the weather four times a day. The book is older than the lamp, and its first "
    "pages are in a hand nobody alive can read without effort. On the last line of every page somebody has counted "
    "the ships. When the radio came, the counting stopped for a year, and then, without an order from anyone, began",
    "To bake bread without a scale, take a bowl and fill it with flour to the height of two fingers. Add a pinch of "
    "salt, a spoon of yeast, and warm water until the dough lets go of the bowl. Cover it with a cloth for an hour. "
    "The oven should be as hot as it gets. After twenty-five minutes, knock on the bottom of the loaf:",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / "
    "len(values)\n\n\ndef variance(values):\n    center = mean(values)\n    return mean([",
    "The river has three bridges. The oldest, built in 1874, carries only people and bicycles; the second, of steel, "
    "carries the railway; and the newest, finished in 2003, carries 41,000 cars a day. When the town flooded in the "
    "spring of 1954, the water stood 3.2 metres above the road, and the only way across was",
    "Question: If a train leaves at half past nine and needs two hours and a quarter, when does it arrive?\nAnswer: At "
    "a quarter to twelve.\n\nQuestion: A shop sells pencils in boxes of twelve. How many boxes are needed for a class "
    "of thirty children, if every child is to have two pencils?\nAnswer:",
]
"""Five texts of different kinds, written for these tests."""


def first_and_slow(first: int, *values: Any) -> list[Any]:
    """Parameters of which only the first are for every run."""
    return [*values[:first], *(pytest.param(value, marks=pytest.mark.slow) for value in values[first:])]


def every_and_slow(step: int, *values: Any) -> list[Any]:
    """Parameters of which the first of each `step` are for every run."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (place % step > 0)) for place, value in enumerate(values)]


class FilesAndVariants(LoadScopeScheduling):
    """A file's tests go to one worker: what they load and compile in common, the other would load and compile again.

    Parity is too much for one worker; there it is the variant that is built once, and that brackets name. Its many
    small groups are dealt out last, so they even out the rest.
    """

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        _, bracket, parameters = test.partition("[")
        return parameters if bracket and file.endswith("test_family_parity.py") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesAndVariants:
    """Not xdist's groups: xdist 3.8 writes them into node ids where pytest 9.2 no longer reads them."""
    return FilesAndVariants(config, log)


def pytest_collection_finish() -> None:
    """A tenth of the time went into looking for garbage among the modules that are loaded by now and stay."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_other_files_are_dropped() -> Iterator[None]:
    """Linux allows a process 65,530 memory maps, and the compiled programs of all tests together take more."""
    # Without a limit within a file: a test that warns would fail.
    kept_programs.MAX_PROGRAMS = sys.maxsize
    yield
    kept_programs.clear()
    jax.clear_caches()


def drawn_adapter(
    config: gj.ModelConfig, seed: int, rank: int = 3, targets: str = "attention,feed_forward"
) -> gj.Adapter:
    """An adapter whose B is not zero."""
    from griffin_jax.adapters.adapter import Factors

    random = np.random.default_rng(seed)
    blank = gj.Adapter.init(config, gj.AdapterConfig(rank=rank, alpha=4.0, targets=targets), jax.random.key(seed))
    factors = {
        name: Factors(each.a, jnp.asarray(random.normal(0, 0.2, each.b.shape), jnp.float32))
        for name, each in blank.factors.items()
    }
    return dataclasses.replace(blank, factors=factors)


@pytest.fixture(scope="session")
def demo_gguf():
    """Path of the demo model's GGUF file, downloaded once."""
    from griffin_jax.checkpoints import demo

    return demo.fetch()


@pytest.fixture(scope="session")
def demo_llm(demo_gguf) -> gj.LLM:
    return gj.load(demo_gguf)


@pytest.fixture(scope="session")
def demo_torch(demo_gguf):
    """The demo model as transformers loads it."""
    torch = load_torch()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyLlama:
    """A random GQA Llama in torch and in JAX, from the same files."""
    return TinyLlama.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def worded(tmp_path_factory) -> TinyLlama:
    """A tiny model that reads text."""
    folder = tmp_path_factory.mktemp("worded")
    tiny_tokenizer(folder, PASSAGES, 320)
    return TinyLlama.build(folder, vocab_size=320)


@pytest.fixture(scope="session")
def long(tmp_path_factory) -> TinyLlama:
    """A tiny model that reads text, with a context for prompts that are long enough for a trial."""
    folder = tmp_path_factory.mktemp("long") / "model"
    folder.mkdir()
    tiny_tokenizer(folder, PASSAGES, 320)
    return TinyLlama.build(folder, vocab_size=320, max_position_embeddings=1024)


@pytest.fixture(scope="session")
def primed(tmp_path_factory) -> TinyLlama:
    """A tiny model that reads text, with the smallest prior next to it."""
    from griffin_jax.evaluation import general_text

    folder = tmp_path_factory.mktemp("worded") / "model"
    folder.mkdir()
    tiny_tokenizer(folder, PASSAGES, 320)
    found = TinyLlama.build(folder, vocab_size=320)
    texts = [found.llm.tokenizer.encode(text) for text in PASSAGES[:2]]
    prior = general_text.measure(found.llm.model, texts, size=2, rows=4, quiet=True)
    prior.save(folder.with_name("model.prior.safetensors"))
    return found


@pytest.fixture(scope="session")
def everything(tiny) -> gj.ExpertNeurons:
    """All neurons of the tiny model."""
    return gj.ExpertNeurons.from_indices([np.arange(48)] * 2, tiny.llm.model.neurons)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Grows by one with every program that XLA compiles."""
    programs: list[str] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield programs
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def shapes_for_arrays() -> Iterator[None]:
    """Dataclasses that are checked to hold arrays may hold shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
