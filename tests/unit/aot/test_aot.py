"""Compiling for chips that are not there: sizes against arithmetic, programs against their HLO, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hlo_reads import looked_up

from griffin_jax.aot import compilation, compilers
from griffin_jax.aot.compilation import compile_for, inspect
from griffin_jax.aot.hlo import Module
from griffin_jax.aot.report import table
from griffin_jax.aot.targets import TARGETS, gpu_target_config, target
from griffin_jax.cli.main import main
from griffin_jax.extensions.speculative import MOST_WITH_COPIES
from griffin_jax.generation.padding import DEFAULT_CHUNK
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.kernels import LEAST_CAPABILITY
from griffin_jax.model.named import named
from griffin_jax.model.products import GEMV_VARIABLE
from griffin_jax.model.sharding import GPU_TILE, INTEGER_TILE
from griffin_jax.utils import download
from griffin_jax.utils.download import CACHE_VARIABLE


@pytest.fixture(scope="session")
def cuda():
    """XLA's compiler for NVIDIA GPUs, fetched once."""
    try:
        return compilers.fetch("cuda")
    except RuntimeError as error:
        pytest.skip(str(error))


def run_with(cuda, script: str) -> subprocess.CompletedProcess[str]:
    """What a script does that has the compiler; in a new process, since this one's backends are not for it to touch."""
    environment = compilation.child_environment(cuda)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def tpu():
    try:
        return compilers.find("tpu")
    except FileNotFoundError as error:
        pytest.skip(str(error))


LLAMA = named("Llama-2-13B", layers=1)
D, F, H, N, V = 5120, 13824, 128, 40, 32000
ATTENTION, ROWS = 4 * D * D + 2 * D, 3 * D
"""Parameters of a layer: attention and both norms; of the feed-forward layer for each neuron."""


@pytest.fixture(scope="module")
def report(cuda):
    """One layer of Llama-2-13B on an H100 as the paper's setting has it, with a short prompt."""
    return compile_for("h100", LLAMA, density=0.5, prompt=100, new=28)


@pytest.fixture(scope="module")
def odd(cuda, tmp_path_factory):
    """Per-sequence experts of a count that fits no tile, and the HLO of every program."""
    folder = tmp_path_factory.mktemp("hlo")
    report = compile_for("h100", LLAMA, density=0.3, batch=2, shared=True, prompt=16, new=16, hlo=folder)
    return report, folder


@pytest.fixture(scope="module")
def beyond(cuda):
    """The same layer with every step beyond GRIFFIN."""
    options = {"quality": "best", "refresh_every": 16, "speculative": 4}
    return compile_for("h100", LLAMA, density=0.5, prompt=300, new=28, **options)


@pytest.fixture(scope="module")
def alike(cuda):
    """The same layer and cache without any of them."""
    return compile_for("h100", LLAMA, density=0.5, prompt=300, new=32)


@pytest.mark.slow
class TestBeyond:
    def test_every_step_compiles(self, beyond):
        assert list(beyond.pruned.memory) == ["prefill", "prune", "decode", "refresh", "speculative"]
        assert all(beyond.pruned.memory.values())
        text = table("all", beyond)
        assert "all memory, speculative" in text
        read = 4 * beyond.pruned.step_bytes + beyond.dense.step_bytes
        assert beyond.round_bytes == beyond.to_json()["round_bytes"] == read
        assert f"A round of 4 drafts reads {read / 1e9:.2f} GB for 1 to 5 tokens: less than" in text
        assert f"for more than {read / beyond.dense.step_bytes:.2f}." in text

    def test_decoding_is_the_same_program(self, beyond, alike):
        for compiled, plain in ((beyond.dense, alike.dense), (beyond.pruned, alike.pruned)):
            assert compiled.kernels_per_step == plain.kernels_per_step
            assert compiled.ff_copies_per_step == compiled.cache_copies_per_step == ()
            assert compiled.weights == plain.weights

    def test_rows_are_held_while_pruning(self, beyond, alike):
        """256 of the prompt and 384 of general text, and systems of 640 equations."""
        more = beyond.pruned.memory["prune"] - alike.pruned.memory["prune"]
        assert 2 * (256 + 384) * F <= more <= 300e6


class TestPrograms:
    @pytest.mark.thorough
    def test_nothing_is_copied(self, report):
        for compiled in (report.dense, report.pruned):
            assert compiled.ff_copies_per_step == compiled.ff_copies_per_call == ()
            assert compiled.cache_copies_per_step == compiled.cache_copies_per_call == ()

    def test_temporaries_hold_neither_a_cache_nor_a_matrix(self, report):
        for compiled in (report.dense, report.pruned):
            assert compiled.temporaries < report.cache // 2 < compiled.kept[0] * D * 2
        assert report.round_bytes is None

    def test_kernels_are_those_of_one_layer(self, report):
        assert 15 <= report.pruned.kernels_per_step <= 30
        assert report.pruned.kernels_per_step == report.dense.kernels_per_step

    @pytest.mark.slow
    def test_kept_neurons_that_fit_no_tile_are_found_out(self, odd):
        report, _ = odd
        assert report.dense.ff_copies_per_step == ()
        assert report.pruned.kept == (4147,)
        assert {"fusion of pad", "fusion of concatenate"} >= set(report.pruned.ff_copies_per_step) != set()
        assert "--round-to 64 avoids that" in table("odd", report)

    def test_whole_tiles_are_not(self, report):
        assert report.pruned.kept[0] % GPU_TILE == 0
        assert "avoids that" not in table("whole tiles", report)

    @pytest.mark.slow
    def test_hlo_is_written(self, odd):
        _, folder = odd
        assert {path.stem for path in folder.iterdir()} == {"prefill", "select", "prune", "dense", "pruned"}
        text = (folder / "dense.txt").read_text()
        found = inspect(text, {(F, D)}, {(2, N, H, 32)})
        assert found["ff_copies_per_step"] == []
        assert "bf16[13824,5120]" in text


@pytest.mark.slow
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (model, options)
        for model in ("Llama-2-13B", "Llama-3-8B", "Gemma-7B")
        for options in ({}, {"weights": "int8"}, {"batch": 8, "shared": True})
    ],
    ids=str,
)
def test_a_layer_is_twelve_kernels(model, options):
    """Four products, one for queries, keys and values, two of attention, one of z; twice a sum and a norm."""
    # From three layers on, angles of positions are computed by a kernel of their own.
    three, four = (compile_for("h100", named(model, layers=n), prompt=100, new=28, **options) for n in (3, 4))
    for name in ("dense", "pruned"):
        fewer, more = getattr(three, name), getattr(four, name)
        assert more.kernels_per_step - fewer.kernels_per_step <= 12
        assert more.cache_copies_per_step == more.cache_copies_per_call == ()


@pytest.mark.slow
def test_what_comes_before_the_first_token(cuda, tmp_path):
    """The statistic of a layer is summed before the next layer is read, and select does not sort."""
    held = {}
    for layers in (2, 4):
        config, folder = named("Llama-2-13B", layers=layers), tmp_path / str(layers)
        report = compile_for("h100", config, prompt=2 * DEFAULT_CHUNK, new=16, hlo=folder)
        held[layers] = report.dense.memory["prefill"] - report.dense.weights - report.cache
    # More layers hold no more z.
    assert held[4] - held[2] < DEFAULT_CHUNK * F * 2
    prefill, select = ((folder / f"{name}.txt").read_text() for name in ("prefill", "select"))
    written = [array for computation in Module.parse(prefill).run() for i in computation for array in i.results]
    assert {array.itemsize for array in written if array.dims[-2:] == (DEFAULT_CHUNK, F)} == {2}
    assert " sort(" not in select
    kernels = [i for computation in Module.parse(select).run() for i in computation if i.runs]
    # Two for each digit of the scores, some for where each neuron goes, and one for each layer's result.
    assert len(kernels) <= 2 * 8 + 16 + layers


@pytest.mark.slow
def test_scores_of_a_long_prompt_are_not_in_memory(cuda, tmp_path):
    """Those of 256 tokens with all others would take ten times the memory that there is for anything."""
    config = named("Llama-3.1-8B", layers=1)
    report = compile_for("h100", config, prompt=32_768, new=16, density=1, hlo=tmp_path)
    temporaries = report.dense.memory["prefill"] - report.dense.weights - report.cache
    assert temporaries < config.num_heads * 256 * 32_768 * 4 // 10
    arrays = [a for c in Module.parse((tmp_path / "prefill.txt").read_text()).run() for i in c for a in i.results]
    assert not any({1024, 32_768 + 16} <= set(array.dims) for array in arrays)


@pytest.mark.slow
def test_no_tpu_keeps_the_scores_of_a_long_prompt(tpu, tmp_path):
    """XLA's operations write those of a block of queries at a time."""
    config = named("Llama-3.1-8B", layers=1)
    report = compile_for("tpu-v5e", config, prompt=32_768, new=16, density=1, hlo=tmp_path)
    assert report.dense.fits
    arrays = [a for c in Module.parse((tmp_path / "prefill.txt").read_text()).run() for i in c for a in i.results]
    assert arrays
    assert not any(sum(size >= 32_768 // 2 for size in array.dims) > 1 for array in arrays)


@pytest.fixture(scope="module")
def divided(cuda, tmp_path_factory):
    """Three layers of Llama-3-70B on eight H100s with the best experts of all, and the HLO of every program."""
    folder = tmp_path_factory.mktemp("divided")
    config = named("Llama-3-70B", layers=3)
    return compile_for("h100", config, devices=8, groups=1, prompt=250, new=24, hlo=folder), folder


@pytest.mark.slow
class TestDevices:
    def test_a_layer_takes_two_sums(self, divided):
        report, _ = divided
        for compiled in (report.dense, report.pruned):
            assert compiled.collectives_in_layers == {"all-reduce": 2 * 3}
            # The embedding's row, and the best token of each device with its score.
            assert compiled.collectives_elsewhere == {"all-reduce": 1, "all-gather": 1}
            # Seven sums of D bfloat16s, of which the row is looked up twice; of each device a score and an index.
            assert compiled.communicated_per_step == (6 + 2) * 8192 * 2 + 8 * (4 + 4)

    def test_nothing_is_copied_or_put_together(self, divided):
        report, folder = divided
        for name, compiled, neurons in (("dense", report.dense, 28672), ("pruned", report.pruned, 14336)):
            assert compiled.ff_copies_per_step == compiled.ff_copies_per_call == ()
            assert compiled.cache_copies_per_step == ()
            assert compiled.temporaries < 2_000_000
            text = (folder / f"{name}.txt").read_text()
            assert f"bf16[2,{neurons // 8},8192]" in text
            assert f"bf16[2,{neurons},8192]" not in text
            assert "bf16[128256,8192]" not in text

    def test_sizes_are_those_of_a_device(self, divided):
        report, _ = divided
        d, f, v = 8192, 28672, 128256
        layer = (2 * d * d + 2 * 1024 * d + 3 * f * d) // 8 + 2 * d
        assert report.dense.weights == 2 * (2 * v * d // 8 + d + 3 * layer)
        assert report.dense.weights - report.pruned.weights == 2 * 3 * 3 * f // 16 * d
        assert report.cache == 2 * 3 * 128 * report.slots * 2
        held = report.dense.weights + report.cache + report.dense.temporaries
        assert 0 <= report.dense.memory["decode"] - held < 1_000_000
        assert report.dense.ceiling == pytest.approx(3.35e12 / report.dense.step_bytes)
        assert report.parameters == 2 * v * d + d + 3 * (8 * layer - 14 * d)
        assert report.replicated == ()

    def test_prune_says_what_it_moves(self, divided):
        report, _ = divided
        assert report.dense.collectives_in_prune is None
        assert set(report.pruned.collectives_in_prune) == {"reduce-scatter"}
        # Each device puts in its own of all kept rows, and gets its share of them.
        rows = 3 * 3 * 14336 * 8192 * 2
        assert report.pruned.communicated_in_prune == rows

    def test_the_statistic_is_not_put_together(self, divided):
        module = Module.parse((divided[1] / "prefill.txt").read_text())
        gathered = [c.size for c in module.collectives(module.run()) if c.kind == "all-gather"]
        assert all(size < 28672 * 4 for size in gathered)

    @pytest.mark.slow
    def test_groups_move_no_rows(self, cuda):
        config = named("Llama-3-70B", layers=1)
        report = compile_for("h100", config, devices=8, prompt=16, new=16, batch=2)
        assert report.pruned.collectives_in_prune == {}
        assert report.pruned.communicated_in_prune == 0
        for compiled in (report.dense, report.pruned):
            assert compiled.collectives_in_layers == {"all-reduce": 2}
            assert compiled.ff_copies_per_step == ()
        shown = table("Llama", report)
        assert ", experts of 8 groups" in shown.splitlines()[1]
        assert "communicated, prune                         -         0.00 MB" in shown

    def test_table(self, divided):
        lines = table("Llama", divided[0]).splitlines()
        assert lines[0].startswith("Llama on 8 x NVIDIA H100 SXM (each 84.94 GB, 3,350 GB/s), compiled without them")
        cells = [line.rsplit(maxsplit=2) for line in lines if line.startswith(("all-", "reduce-"))]
        assert cells == [
            ["all-reduce, each layer", "2", "2"],
            ["all-gather, outside the layers", "1", "1"],
            ["all-reduce, outside the layers", "1", "1"],
            ["reduce-scatter, prune", "0", str(2 * 3)],
        ]
        assert "Ceilings do not count communication." in "\n".join(lines)

    @pytest.mark.slow
    def test_heads_that_cannot_be_shared(self, cuda):
        report = compile_for("h100", named("Qwen2.5-7B", layers=2), devices=8, batch=2, shared=True, prompt=16, new=16)
        assert report.replicated == ("heads",)
        assert report.cache == 2 * 2 * 2 * 4 * 128 * 32 * 2
        for compiled in (report.dense, report.pruned):
            assert compiled.collectives_in_layers == {"all-reduce": 2}
            assert compiled.ff_copies_per_step == ()
        shown = table("Qwen", report)
        assert "Attention and the cache are not divided: 8 devices cannot share the key/value heads evenly." in shown

    @pytest.mark.slow
    def test_heads_that_are_fewer_than_devices(self, cuda):
        config = dataclasses.replace(named("Llama-3-70B", layers=1), num_kv_heads=2)
        report = compile_for("h100", config, devices=8, prompt=16, new=16)
        assert (report.kv_copies, report.replicated) == (4, ())
        assert report.cache == 2 * 128 * 32 * 2
        assert report.parameters == compile_for("h100", config, prompt=16, new=16).parameters
        for compiled in (report.dense, report.pruned):
            assert compiled.collectives_in_layers == {"all-reduce": 2}
            assert compiled.ff_copies_per_step == compiled.cache_copies_per_step == ()
        assert "Each key/value head is there 4 times" in table("Llama", report)

    def test_one_device_talks_to_nobody(self, report):
        for compiled in (report.dense, report.pruned):
            assert compiled.collectives_in_layers == compiled.collectives_elsewhere == {}
            assert compiled.communicated_per_step == 0
        assert report.pruned.collectives_in_prune == {}
        assert "layers  " not in table("alone", report)


@functools.cache
def compiled_layer(weights: str, batch: int, devices: int, model: str):
    config = named(model, layers=1)
    return compile_for("h100", config, weights=weights, batch=batch, devices=devices, prompt=100, new=28)


def few_bits(weights: str, batch: int, devices: int, model: str = "Llama-2-13B"):
    """One layer with matrices of integers on H100s; every sequence has experts of its own."""
    # A cache takes arguments that are left out and the same ones given for different calls.
    return compiled_layer(weights, batch, devices, model)


FEW_BITS = [("int4", 1, 1, "Llama-2-13B")]
MORE_FEW_BITS = [
    *(
        ("int8", 1, 1, "Llama-2-13B"),
        ("int8", 8, 1, "Llama-2-13B"),
        ("int8:64", 1, 1, "Llama-2-13B"),
        ("int4", 8, 1, "Llama-2-13B"),
    ),
    *(("int8", 1, 8, "Llama-2-13B"), ("int4", 1, 8, "Llama-2-13B"), ("int8", 8, 8, "Llama-2-13B")),
    ("int4", 8, 8, "Llama-2-13B"),
    *(("int4", 1, 1, "Gemma-7B"), ("int8", 8, 1, "Gemma-7B"), ("int4", 8, 8, "Gemma-7B")),
]


@pytest.mark.thorough
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("weights", "batch", "devices", "model"),
    FEW_BITS + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_FEW_BITS],
)
def test_integers_are_neither_copied_nor_converted(weights, batch, devices, model):
    report = few_bits(weights, batch, devices, model)
    row = named(model).width * (4 if weights == "int4" else 8) // 8
    for compiled in (report.dense, report.pruned):
        assert compiled.ff_copies_per_step == compiled.ff_copies_per_call == ()
        # The least matrix, as it is stored on a device: that of the attention's outputs, or, for the partial sums of
        # more tokens, the down projection.
        rows = named(model).width if batch == 1 else compiled.kept[0]
        assert compiled.temporaries < rows * row // devices


@pytest.mark.slow
@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("model", ["Mixtral-8x7B", "Qwen3-30B-A3B"])
def test_a_step_reads_the_chosen_experts(cuda, tmp_path, model, whole_experts):
    """As many matrices as a token chooses, dense and pruned, of four devices a quarter of each or whole ones."""
    config = named(model, layers=1)
    options = {"devices": 4, "round_to": 4, "prompt": 128, "new": 64, "expert_parallel": whole_experts}
    report = compile_for("h100", config, density=0.5, **options, hlo=tmp_path)
    routing, parts = config.routing, 1 if whole_experts else 4
    for name, compiled, width in (
        ("dense", report.dense, routing.width),
        ("pruned", report.pruned, routing.width // 2),
    ):
        row = width // parts * config.width
        held = routing.experts // (4 // parts)
        program = (tmp_path / f"{name}.txt").read_text()
        assert looked_up(program, {held * 2 * row, held * row}) == (3 * routing.active * row, [])
        assert compiled.ff_copies_per_step == compiled.cache_copies_per_step == ()
        assert compiled.collectives_in_layers == {"all-reduce": 2}


@pytest.mark.slow
@pytest.mark.usefixtures("cuda")
class TestTwoFormats:
    OPTIONS = {"weights": "int8", "mixed_weights": "int4", "prompt": 100, "new": 28}  # noqa: RUF012
    FINE, FEW = ROWS + 8, ROWS * 9 // 16
    """Bytes of a neuron: its numbers and the scales of gate and up; 4 bits and a float16 for each group of 32."""

    def test_precise_neurons_and_others(self):
        found = compile_for("h100", LLAMA, density=0.75, round_to=INTEGER_TILE, **self.OPTIONS)
        precise, others = 46 * INTEGER_TILE, F - 46 * INTEGER_TILE
        assert found.pruned.few_bits == (others,)
        assert found.pruned.precise == (precise,)
        assert found.pruned.ff_copies_per_step == found.pruned.ff_copies_per_call == ()
        copied = precise * self.FINE + others * self.FEW
        assert found.dense.weights - found.pruned.weights == found.dense.step_bytes - found.pruned.step_bytes
        assert found.dense.weights - found.pruned.weights == F * self.FINE - copied
        assert found.pruned.temporaries < 3e6
        # The full model, all neurons in int4, and the copies.
        held = found.dense.weights + F * self.FEW + copied + found.cache
        assert held <= found.pruned.memory["decode"] <= held + 5e6
        assert found.pruned.memory["prefill"] - found.dense.memory["prefill"] == F * self.FEW
        lines = table("Llama", found).splitlines()
        assert lines[4].split() == ["of", "these", "in", "int4", "-", f"{others:,}"]

    def test_all_that_is_kept_in_few_bits(self):
        """The rows of the full model are there while others are pruned."""
        found = compile_for("h100", LLAMA, density=0.5, **self.OPTIONS)
        assert (found.pruned.kept, found.pruned.precise) == ((F * 8 // 9,), (0,))
        assert found.pruned.ff_copies_per_step == ()
        held = found.dense.weights + (F + F * 8 // 9) * self.FEW + found.cache
        for phase in ("prune", "decode"):
            assert held <= found.pruned.memory[phase] <= held + 5e6

    def test_all_in_few_bits_are_those_that_are_there(self):
        found = compile_for("h100", LLAMA, density=0.5625, **self.OPTIONS)
        assert (found.pruned.kept, found.pruned.precise) == ((F,), (0,))
        assert "prune" not in found.pruned.memory
        held = found.dense.weights + F * self.FEW + found.cache
        assert held <= found.pruned.memory["decode"] <= held + 5e6

    def test_several_sequences_are_masked(self):
        found = compile_for("h100", LLAMA, density=0.75, batch=3, **self.OPTIONS)
        assert found.masked
        assert found.pruned.ff_copies_per_step == ()
        assert found.pruned.step_bytes - found.dense.step_bytes == F * self.FEW

    def test_devices(self):
        found = compile_for("h100", LLAMA, density=0.75, devices=2, **self.OPTIONS)
        assert found.pruned.ff_copies_per_step == ()
        assert found.pruned.step_bytes < found.dense.step_bytes

    def test_what_is_padded_is_said(self):
        found = compile_for("h100", LLAMA, density=0.75, **self.OPTIONS)
        assert found.pruned.ff_copies_per_step
        assert "--round-to 128 avoids that" in table("Llama", found)

    @pytest.mark.parametrize(("options", "message"), [
        ({"speculative": 4}, "mixed_weights do not go with speculative"),
        ({"refresh_every": 4}, "mixed_weights do not go with refresh_every"),
        ({"quality": "best"}, "rows in two formats are not refitted"),
        ({"weights": "int4"}, "the second format needs fewer bits"),
        ({"mixed_weights": "int4:48"}, "groups of 48 do not divide"),
        ({"devices": 4}, "round_to=4"),
    ])  # fmt: skip
    def test_what_it_does_not_go_with(self, options, message):
        with pytest.raises(ValueError, match=message):
            compile_for("h100", LLAMA, density=0.75, **(self.OPTIONS | options))


@pytest.mark.slow
@pytest.mark.usefixtures("cuda")
def test_integers_are_not_converted_for_the_drafts_of_a_round():
    """As many as there are with copies; one more token is multiplied by matrices that are converted in memory."""
    options = {"weights": "int4", "density": 0.5, "prompt": 100, "new": 28}
    for drafts, converted in ((MOST_WITH_COPIES, False), (MOST_WITH_COPIES + 1, True)):
        found = compile_for("h100", LLAMA, speculative=drafts, **options)
        held = found.dense.weights + found.pruned.weights + found.cache
        assert (found.pruned.memory["speculative"] - held > 2 * D * F) == converted


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_kernels_for_integers_read_them_as_they_are_stored(cuda, monkeypatch, tmp_path, weights):
    """Three products by one kernel, two by the other; words are no copies of the integers."""
    options = {"weights": weights, "density": 0.5, "prompt": 100, "new": 28}
    without = compile_for("h100", LLAMA, **options)
    monkeypatch.setenv(GEMV_VARIABLE, "1")
    found = compile_for("h100", LLAMA, hlo=tmp_path, **options)
    for name, program in (("dense", found.dense), ("pruned", found.pruned)):
        module = Module.parse((tmp_path / f"{name}.txt").read_text())
        calls = [i.origin for computation in module.run() for i in computation if i.opcode == "custom-call"]
        assert sum("jit(rows_times)" in origin for origin in calls) == 3
        assert sum("jit(sums_of_rows)" in origin for origin in calls) == 2
        assert program.ff_copies_per_step == program.ff_copies_per_call == ()
        assert program.temporaries < D * F // 8
    assert found.dense.kernels_per_step <= without.dense.kernels_per_step


@pytest.mark.usefixtures("cuda")
class TestFewBits:
    def test_bytes_of_int4(self):
        """Groups of 32 with a scale of 16 bits, and the vocabulary's matrices of 8 bits."""
        report = few_bits("int4", 1, 1)
        matrices, vocabulary = 4 * D * D + F * ROWS, V * D
        assert report.dense.weights == matrices // 2 + matrices // 16 + 2 * (vocabulary + vocabulary // 16) + 3 * D * 2
        assert report.dense.weights - report.pruned.weights == F // 2 * ROWS * 9 // 16
        held = report.dense.weights + report.cache + report.dense.temporaries
        assert 0 <= report.dense.memory["decode"] - held < 1_000_000

    @pytest.mark.slow
    def test_bytes_of_int8(self):
        """A float32 scale for each output; those of the down projection are for all sequences."""
        report = few_bits("int8", 8, 1)
        outputs = 3 * D + D + 2 * F + D + 2 * V
        assert report.dense.weights == 4 * D * D + F * ROWS + 2 * V * D + 4 * outputs + 3 * D * 2
        assert report.pruned.weights - report.dense.weights == (8 // 2 - 1) * F * (ROWS + 2 * 4)

    def test_the_report_says_it(self):
        assert table("Llama", few_bits("int4", 1, 1)).splitlines()[1].startswith("int4 in bfloat16, batch 1, ")


class TestSizes:
    def test_weights_cache_and_reads(self, report):
        layer = ATTENTION + F * ROWS
        assert report.parameters == 2 * V * D + D + layer
        assert report.slots == 128 + 32
        assert report.cache == 2 * N * H * 160 * 2
        assert report.dense.weights == 2 * report.parameters
        assert report.pruned.weights == 2 * (report.parameters - F // 2 * ROWS)
        # Of the embedding one row is read; all of the head is.
        assert report.dense.step_bytes == 2 * (V * D + D + D + layer) + report.cache
        assert report.dense.step_bytes - report.pruned.step_bytes == F // 2 * ROWS * 2
        assert report.dense.ceiling == pytest.approx(3.35e12 / report.dense.step_bytes)
        assert report.speedup_ceiling == pytest.approx(report.dense.step_bytes / report.pruned.step_bytes)

    def test_memory_of_each_phase(self, report):
        rest = 1_000_000
        held = report.dense.weights + report.cache
        assert 0 <= report.dense.memory["decode"] - held - report.dense.temporaries < rest
        rows = F // 2 * ROWS * 2
        assert 0 <= report.pruned.memory["decode"] - held - rows - report.pruned.temporaries < rest
        assert 0 <= report.pruned.memory["prune"] - held - rows < rest
        assert report.pruned.memory["prefill"] == report.dense.memory["prefill"] > held
        assert report.dense.fits
        assert report.pruned.fits

    @pytest.mark.slow
    def test_each_sequence_has_matrices_of_its_own(self, odd):
        own = compile_for("h100", named("SmolLM2-135M", layers=1), prompt=16, new=16, batch=4)
        rows = 768 * 3 * 576 * 2
        assert own.pruned.weights - own.dense.weights == (4 - 2) * rows
        assert 0 <= own.pruned.memory["decode"] - own.dense.memory["decode"] - 4 * rows < 2 * rows
        assert own.cache == 4 * 2 * 3 * 64 * 32 * 2
        assert own.dense.ceiling == pytest.approx(4 * 3.35e12 / own.dense.step_bytes)
        shared, _ = odd
        assert shared.dense.weights - shared.pruned.weights == 2 * (F - 4147) * ROWS


def test_every_gpu_is_accepted(cuda):
    """XLA reads each description."""
    script = """if True:
        from jax.experimental import topologies
        from griffin_jax.aot.targets import TARGETS, gpu_target_config
        for name, chip in TARGETS.items():
            if chip.gpu is not None:
                (device,) = topologies.get_topology_desc(
                    platform="cuda", topology_name=name, target_config=gpu_target_config(chip), topology="1x1x1"
                ).devices
                print(device.device_kind)
    """
    result = run_with(cuda, script)
    assert result.stdout.splitlines() == [chip.name for chip in TARGETS.values() if chip.gpu is not None], result.stderr


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("rtx4090", [256]),
        *(
            pytest.param(name, [64, 128, 160, 256, 512], marks=pytest.mark.slow)
            for name, chip in TARGETS.items()
            if chip.gpu is not None
        ),
    ],
    ids=str,
)
def test_attention_compiles_for_every_gpu(cuda, name, sizes):
    """With as much shared memory as each has: a prompt, few tokens of many query heads, and one."""
    script = f"""if True:
        import jax, jax.numpy as jnp, numpy as np
        from jax.experimental import topologies
        from griffin_jax.aot.targets import TARGETS, gpu_target_config
        from griffin_jax.model import flash
        (device,) = topologies.get_topology_desc(
            platform="cuda", topology_name="one", target_config=gpu_target_config(TARGETS[{name!r}]), topology="1x1x1"
        ).devices
        mesh = jax.sharding.Mesh(np.asarray([device]), ("model",))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        def array(*shape, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
        def positions(*shape):
            return array(*shape, dtype=jnp.int32)
        def compile(kernel, *operands):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                lowered = jax.jit(lambda *arrays: kernel(*arrays, scale=0.1)).lower(*operands)
            lowered.compile()
        for size in {sizes!r}:
            cache = array(1, 1, size, 256), array(1, 1, 256, size)
            for kernel, tokens in ((flash.read_prompt, 200), (flash.read_few, 9)):
                query = array(1, 8, tokens, size)
                compile(kernel, query, *cache, positions(1, tokens), positions(1, 256), positions())
            token = array(1, 1, 64, size), array(1, 1, size), array(1, 1, size)
            compile(flash.decode_step, *token, *cache, positions(1), positions(1, 256), positions())
    """
    result = run_with(cuda, script)
    assert result.returncode == 0, result.stderr


def test_targets_are_gpus_that_triton_compiles_for():
    """Programs for them have its kernels, whatever GPU is there."""
    assert all(chip.gpu.capability >= LEAST_CAPABILITY for chip in TARGETS.values() if chip.gpu is not None)


def test_tpu(tpu):
    report = compile_for("tpu-v5e", named("SmolLM2-135M", layers=1), prompt=16, new=16)
    assert report.dense.fits
    assert report.pruned.ff_copies_per_step == ()


@pytest.mark.slow
def test_tpu_slice(tpu):
    report = compile_for("tpu-v6e", named("SmolLM2-1.7B", layers=2), devices=8, prompt=16, new=16)
    assert report.dense.collectives_in_layers == report.pruned.collectives_in_layers == {"all-reduce": 4}
    assert report.pruned.ff_copies_per_step == ()


@pytest.mark.slow
def test_command_with_a_folder(cuda, capfd, tiny):
    code = main(["compile", "--target", "A100", "--model", str(tiny.folder), "--prompt", "8", "--new", "8"])
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].endswith("on NVIDIA A100 SXM 80 GB (85.10 GB, 2,040 GB/s), compiled without it:")
    columns = [line for line in lines if line.startswith(("weights", "fits", "kernels", "ceiling"))]
    assert len(columns) == 5
    assert len({len(line) for line in columns}) == 1
    assert "computed, not measured" in out


@pytest.fixture
def found(monkeypatch):
    """What a compiler might have found, instead of a compiler."""
    program = {"arguments": 5, "outputs": 1, "aliased": 1, "temporaries": 7, "kernels_per_step": 9}
    copies = {field: [] for field in compilation.PROGRAM_FIELDS if "copies" in field}
    moved = {"collectives_in_layers": {"all-reduce": 4}, "collectives_elsewhere": {}, "communicated_per_step": 8}
    program |= copies | moved | {"collectives": {}, "communicated": 0}
    found = dict.fromkeys(("prefill", "dense", "prune", "pruned"), program) | {"refusals": []}
    monkeypatch.setattr(compilers, "_installed", lambda module: True)
    monkeypatch.setattr(compilation, "_in_child", lambda task, compiler: found)
    return found


class TestOutcomes:
    def test_json(self, capfd, found):
        arguments = ["--model", "llama-2-13b", "--layers", "2", "--prompt", "16", "--new", "8", "--json"]
        code = main(["compile", "--target", "L40", *arguments])
        out, _ = capfd.readouterr()
        result = json.loads(out)
        assert code == 0
        assert result["model"] == "llama-2-13b"
        assert result["target"] == "l40"
        assert result["chip"]["bandwidth"] == 864e9
        assert result["layers"] == 2
        assert result["pruned"]["kept"] == [6912, 6912]
        assert result["dense"]["ff_copies_per_step"] == []
        assert result["dense"]["memory"]["decode"] == 12
        assert result["speedup_ceiling"] > 1

    def test_devices(self, capfd, found):
        arguments = ["--model", "llama-2-13b", "--layers", "2", "--prompt", "16", "--new", "8", "--devices", "4"]
        assert main(["compile", "--target", "L40", *arguments, "--json"]) == 0
        result = json.loads(capfd.readouterr()[0])
        assert (result["devices"], result["replicated"]) == (4, [])
        assert result["pruned"]["collectives_in_layers"] == {"all-reduce": 4}
        assert main(["compile", "--target", "L40", *arguments]) == 0
        lines = capfd.readouterr()[0].splitlines()
        assert f"{'all-reduce, each layer':29}{'2':>16}{'2':>16}" in lines

    def test_a_config_is_enough(self, capfd, found, tiny, tmp_path):
        (tmp_path / "config.json").write_bytes((tiny.folder / "config.json").read_bytes())
        assert main(["compile", "--target", "L40", "--model", str(tmp_path), "--prompt", "8", "--new", "8"]) == 0
        assert "NVIDIA L40" in capfd.readouterr()[0]

    def test_tiles_of_each_device(self, found):
        found["pruned"] = found["pruned"] | {"ff_copies_per_step": ["fusion of pad"]}
        assert "of a device are no multiple of 64" in table("Llama", compile_for("h100", LLAMA, devices=8))
        assert "--round-to 512 avoids" in table("Llama", compile_for("h100", LLAMA, devices=8))
        assert "avoids" not in table("Llama", compile_for("h100", LLAMA, devices=8, round_to=512))

    def test_what_does_not_fit(self, found):
        del found["prune"], found["pruned"]
        found["dense"] = found["dense"] | {"arguments": TARGETS["rtx4090"].memory - 6}
        report = compile_for("rtx4090", LLAMA, density=1)
        assert not report.dense.fits
        assert report.pruned is None
        assert report.speedup_ceiling is None
        assert " NO" in table("Llama", report)
        found["dense"]["arguments"] -= 1
        assert compile_for("rtx4090", LLAMA, density=1).dense.fits

    def test_what_a_tpu_refuses_does_not_fit(self, found):
        """XLA compiles no TPU program that needs more memory than there is."""
        found |= {"refusals": ["dense: too large"], "dense": None, "pruned": None}
        report = compile_for("tpu-v5e", LLAMA)
        assert not report.dense.fits
        assert report.dense.memory["decode"] is None
        shown = table("Llama", report)
        assert "refused" in table("Llama", compile_for("tpu-v5e", LLAMA, devices=4))
        assert "refused" in shown
        assert "not compiled: dense: too large" in shown


@pytest.mark.parametrize(
    ("refusal", "more_memory"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.35G of 15.75G hbm.", True),
        ("RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 106752, available: 101376", False),
        ("INTERNAL: no such instruction", False),
    ],
)
def test_what_is_refused_for_want_of_memory(refusal, more_memory):
    assert compilation.needs_more_memory(refusal) == more_memory


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("h1000", {}, "no target 'h1000'; there are h100, h200, a100, l40, rtx4090, tpu-v5e, tpu-v6e"),
            ("h100", {"groups": 5}, "5 groups cannot have equally many of 13824 neurons"),
            ("h100", {"batch": 0}, "batch must be a whole number of at least 1, got 0"),
            ("h100", {"prompt": 1.5}, "prompt must be"),
            ("h100", {"new": True}, "new must be"),
            ("h100", {"prompt": 4000}, "4000 \\+ 128 tokens are more than the model's context of 4096"),
            ("h100", {"density": 0}, "density must be in"),
            ("h100", {"density": (0.5, 0.5)}, "2 densities for 1 layers"),
            ("h100", {"dtype": "int8"}, "dtype is 'int8'"),
            ("h100", {"quality": "good"}, "quality must be one of griffin, best, got 'good'"),
            ("h100", {"speculative": 0}, "speculative must be a whole number of at least 1, got 0"),
            ("h100", {"refresh_every": 128}, "an answer of 128 tokens ends before"),
            ("h100", {"devices": 0}, "devices must be a whole number of at least 1, got 0"),
            ("h100", {"devices": 5}, "5 devices cannot share the 13824 neurons"),
            ("h100", {"devices": 8, "density": 0.3}, r"8 devices cannot share 4147 kept neurons .*--round-to 8;"),
            ("tpu-v5e", {"devices": 2}, "TPU v5e works in slices of 1, 4, 8, 16 or 32 devices, not 2"),
        ],
    )
    def test_values(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            compile_for(name, LLAMA, **options)

    def test_command(self, capfd):
        for arguments, message in (
            (["--target", "h100", "--model", "gpt-5"], "no model named 'gpt-5'; there are Llama-2-7B"),
            (
                ["--target", "h100", "--model", "llama-2-7b", "--layers", "40"],
                "layers must be a whole number in [1, 32]",
            ),
            (["--target", "gtx", "--model", "llama-2-7b"], "no target 'gtx'"),
        ):
            assert main(["compile", *arguments]) == 2
            out, err = capfd.readouterr()
            assert out == ""
            assert message in err
            assert err.count("\n") == 1

    def test_a_compiler_that_fails(self, monkeypatch):
        failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nRuntimeError: no such chip\n\n")
        monkeypatch.setattr(compilers, "_installed", lambda module: True)
        monkeypatch.setattr(compilation.subprocess, "run", lambda *_, **__: failed)
        with pytest.raises(RuntimeError, match="the compiler failed: RuntimeError: no such chip"):
            compile_for("h100", LLAMA)


class TestFetching:
    @pytest.fixture
    def pip(self, monkeypatch, tmp_path):
        """A package index in place of the real one, and an environment without compilers."""
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
        monkeypatch.setattr(compilers, "_installed", lambda module: False)
        calls: list[list[str]] = []

        def run(command, **options):
            calls.append(command)
            if calls[0] is None:
                return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")
            Path(command[command.index("--target") + 1], "libtpu").mkdir(parents=True)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(download.subprocess, "run", run)
        return calls

    def test_once_and_only_what_is_needed(self, pip, tmp_path):
        notices: list[str] = []
        version = importlib.metadata.version("jaxlib")
        with pytest.raises(FileNotFoundError, match="has not been fetched"):
            compilers.find("cuda")
        folder = compilers.fetch("cuda", notices.append)
        assert compilers.fetch("cuda", notices.append) == compilers.find("cuda") == folder
        assert len(pip) == len(notices) == 1
        assert pip[0][-2:] == [f"jax-cuda12-plugin=={version}", f"jax-cuda12-pjrt=={version}"]
        assert "--no-deps" in pip[0]
        assert "182 MB" in notices[0]
        assert list((tmp_path / "compilers").iterdir()) == [folder]
        assert compilers.search_path(folder).endswith(str(folder))

    def test_libtpu_is_the_one_that_jax_asks_for(self, pip):
        compilers.fetch("tpu")
        assert pip[0][-1] in {line.split(";")[0].strip() for line in importlib.metadata.requires("jax") or []}

    def test_no_network(self, pip, tmp_path):
        pip.append(None)
        with pytest.raises(RuntimeError, match=r"could not be fetched: ERROR: no network\. .* pip install --no-deps"):
            compile_for("h100", LLAMA)
        assert list((tmp_path / "compilers").iterdir()) == []

    def test_a_folder_that_cannot_be_written(self, pip, tmp_path):
        (tmp_path / "compilers").write_text("a file")
        with pytest.raises(RuntimeError, match="cannot be written"):
            compilers.fetch("cuda")

    def test_an_environment_that_has_it(self, pip, monkeypatch):
        monkeypatch.setattr(compilers, "_installed", lambda module: module == "jax_plugins.xla_cuda13")
        assert compilers.fetch("cuda") is None
        assert pip == []


def test_targets_are_found_in_any_case():
    assert target("H100") is TARGETS["h100"]
    with pytest.raises(ValueError, match="TPU v5e is not a GPU"):
        gpu_target_config(TARGETS["tpu-v5e"])


HLO = """\
HloModule jit_decode, is_scheduled=true

%fused_matvec (p.0: bf16[8,4], p.1: bf16[4]) -> bf16[8] {
  %p.0 = bf16[8,4]{1,0} parameter(0)
  %p.1 = bf16[4]{0} parameter(1)
  ROOT %dot = bf16[8]{0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_pad (p.2: bf16[8,4]) -> bf16[9,4] {
  %p.2 = bf16[8,4]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  ROOT %pad = bf16[9,4]{1,0} pad(%p.2, %zero), padding=0_1x0_0
}

%fused_write (p.3: bf16[1,2,6], p.4: bf16[1,2,1], p.5: s32[]) -> bf16[1,2,6] {
  %p.3 = bf16[1,2,6]{2,1,0} parameter(0)
  %p.4 = bf16[1,2,1]{2,1,0} parameter(1)
  %p.5 = s32[] parameter(2)
  ROOT %write = bf16[1,2,6]{2,1,0} dynamic-update-slice(%p.3, %p.4, %p.5, %p.5, %p.5)
}

%body (state: (s32[], bf16[8,4], /*index=2*/bf16[1,2,6], bf16[4])) -> (s32[], bf16[8,4], bf16[1,2,6], bf16[4]) {
  %state = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[1,2,6]{2,1,0}, bf16[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %cache = bf16[1,2,6]{2,1,0} get-tuple-element(%state), index=2
  %x = bf16[4]{0} get-tuple-element(%state), index=3
  %flat = bf16[2,4,4]{2,1,0} bitcast(%w)
  %matvec = bf16[8]{0} fusion(%w, %x), kind=kCustom, calls=%fused_matvec
  %fetch = (bf16[8,4]{1,0:T(8,128)S(1)}, bf16[8,4]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %fetched = bf16[8,4]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %part = ((bf16[8,4]{1,0}), bf16[4,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:4], [0:4]}
  %written = bf16[1,2,6]{2,1,0} fusion(%cache, %x, %i), kind=kLoop, calls=%fused_write
  SPOILED
  ROOT %next = (s32[], bf16[8,4]{1,0}, bf16[1,2,6]{2,1,0}, bf16[4]{0}) tuple(%i, %w, %written, %x)
}

%condition (state.1: (s32[], bf16[8,4], bf16[1,2,6], bf16[4])) -> pred[] {
  %state.1 = (s32[], bf16[8,4]{1,0}, bf16[1,2,6]{2,1,0}, bf16[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %i.1), direction=LT
}

ENTRY %main (a: s32[], b: bf16[8,4], c: bf16[1,2,6], d: bf16[4]) -> s32[] {
  %a = s32[] parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %c = bf16[1,2,6]{2,1,0} parameter(2)
  %d = bf16[4]{0} parameter(3)
  %t = (s32[], bf16[8,4]{1,0}, bf16[1,2,6]{2,1,0}, bf16[4]{0}) tuple(%a, %b, %c, %d)
  %loop = (s32[], bf16[8,4]{1,0}, bf16[1,2,6]{2,1,0}, bf16[4]{0}) while(%t), condition=%condition, body=%body
  ROOT %end = s32[] get-tuple-element(%loop), index=0
}
"""


class TestReadingHlo:
    """On a small module, whole and spoiled in every way that is looked for."""

    def read(self, line: str = "", on_chip: int | None = 1):
        return inspect(HLO.replace("SPOILED", line), {(8, 4)}, {(1, 2, 6)}, on_chip)

    def test_a_clean_loop(self):
        found = self.read()
        # matvec, fetch, part, written; the condition's compare
        assert found.pop("kernels_per_step") == 5
        assert set(found) == set(compilation.PROGRAM_FIELDS) - {"kernels_per_step", "temporaries"}
        assert not any(found.values())

    @pytest.mark.parametrize(
        ("line", "kind"),
        [
            ("%bad = bf16[8,4]{0,1} copy(%w)", "copy"),
            ("%bad = bf16[4,8]{1,0} transpose(%w), dimensions={1,0}", "transpose"),
            ("%bad = f32[8,4]{1,0} convert(%w)", "convert"),
            ("%bad = bf16[4,4]{1,0} gather(%w, %i), offset_dims={1}", "gather"),
            ("%bad = bf16[4,4]{1,0} slice(%w), slice={[0:4], [0:4]}", "slice"),
            ("%bad = f32[2,4,4]{2,1,0} convert(%flat)", "convert"),
            ("%bad = bf16[9,4]{1,0} fusion(%w), kind=kLoop, calls=%fused_pad", "fusion of pad"),
            ("%bad = (bf16[8,4]{1,0}, bf16[8,4]{1,0:S(1)}, u32[]) copy-start(%w)", "copy"),
        ],
    )
    def test_spoiled_weights(self, line, kind):
        found = self.read(line)
        assert found["ff_copies_per_step"] == [kind]
        assert found["cache_copies_per_step"] == []

    @pytest.mark.parametrize(
        ("line", "kind", "size"),
        [
            ("%sum = f32[4]{0} all-reduce(%x), to_apply=%add", "all-reduce", 16),
            ("%sum = bf16[4]{0} all-reduce-start(%x), to_apply=%add", "all-reduce", 8),
            ("%sum = (bf16[4]{0}, s32[2]{0}) all-reduce-start(%x, %i), to_apply=%add", "all-reduce", 16),
            ("%all = (bf16[4]{0}, bf16[8,4]{1,0}) all-gather-start(%x), dimensions={0}", "all-gather", 64),
            ("%all = ((bf16[4], s32[]), (bf16[8,4], s32[8])) all-gather-start(%x, %i)", "all-gather", 96),
            ("%all = pred[4]{0} fusion(%x), kind=kCustom, calls=%fused_gather", "all-gather", 4),
        ],
    )
    def test_communication(self, line, kind, size):
        inner = "%fused_gather (p.6: pred[4]) -> pred[4] {\n  ROOT %all.1 = pred[4]{0} all-gather(%p.6)\n}\n\n"
        text = HLO.replace("%body (", inner + "%body (")
        for scope, where in (("layer", "collectives_in_layers"), ("player", "collectives_elsewhere")):
            named_line = f'{line}, metadata={{op_name="jit(decode)/while/body/{scope}/dot_general"}}'
            named_inner = text.replace("all-gather(%p.6)", f'all-gather(%p.6), metadata={{op_name="a/{scope}/b"}}')
            found = inspect(named_inner.replace("SPOILED", named_line), set(), set())
            assert found[where] == {kind: 1}
            assert found["communicated_per_step"] == size
        assert inspect(text.replace("SPOILED", line), set(), set())["collectives_elsewhere"] == {kind: 1}

    def test_weights_that_are_put_together(self):
        found = self.read("%all = (bf16[8,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%w), dimensions={0}")
        assert found["ff_copies_per_step"] == ["all-gather"]

    @pytest.mark.parametrize("integer", ["s8", "s4"])
    @pytest.mark.parametrize(
        ("line", "kind"),
        [
            ("%bad = bf16[8,4]{1,0} convert(%w)", "convert"),
            ("%bad = f32[8,2,2]{2,1,0} convert(%groups)", "convert"),
            ("%bad = f32[8,2,2]{2,1,0} fusion(%groups, %x), kind=kLoop, calls=%fused_scale", "fusion of convert"),
            # A loop may get a matrix with its axes split, or only its scales are repeated.
            ("%it = INT[8,2,2] get-tuple-element(%state), index=1\n  %bad = f32[8,4]{1,0} convert(%it)", "convert"),
            ("%bad = f32[8,2,2]{2,1,0} broadcast(%x), dimensions={0,1}", "broadcast"),
        ],
    )
    def test_integers_that_are_converted(self, integer, line, kind):
        """In the shape of the matrix or in groups, whatever the new dtype."""
        inner = (
            "%fused_scale (p.7: bf16[8,2,2], p.8: bf16[4]) -> f32[8,2,2] {\n  %p.7 = bf16[8,2,2] parameter(0)\n"
            "  ROOT %wide = f32[8,2,2]{2,1,0} convert(%p.7)\n}\n\n"
        )
        text = HLO.replace("%body (", inner + "%body (").replace("bf16[8,4]", f"{integer}[8,4]")
        groups = f"%groups = {integer}[8,2,2]{{2,1,0}} bitcast(%w)\n  "
        clean = inspect(text.replace("SPOILED", groups), {(8, 4)}, {(1, 2, 6)}, 1)
        assert clean["ff_copies_per_step"] == clean["ff_copies_per_call"] == []
        text = text.replace("SPOILED", groups + line.replace("INT", integer))
        assert inspect(text, {(8, 4)}, {(1, 2, 6)}, 1)["ff_copies_per_step"] == [kind]

    def test_a_copied_cache(self):
        found = self.read("%bad = bf16[1,2,6]{2,1,0} copy(%cache)")
        assert found["cache_copies_per_step"] == ["copy"]
        assert found["ff_copies_per_step"] == []

    def test_a_custom_call_that_writes_in_place(self):
        call = '%bad = (f32[4]{0}, bf16[1,2,6]{2,1,0}) custom-call(%x, %cache), custom_call_target="kernel"'
        assert self.read(call)["cache_copies_per_step"] == ["custom-call"]
        assert self.read(f"{call}, output_to_operand_aliasing={{{{1}}: (1, {{}})}}")["cache_copies_per_step"] == []
        # What it writes besides is not in place.
        assert self.read(f"{call}, output_to_operand_aliasing={{{{0}}: (0, {{}})}}")["cache_copies_per_step"] != []

    def test_other_memory_counts_where_it_is_not_on_the_chip(self):
        assert self.read(on_chip=None)["ff_copies_per_step"] == ["copy", "slice"]

    def test_an_array_that_returns_from_the_chip(self):
        line = "%here = bf16[8,4]{1,0:S(1)} get-tuple-element(%state), index=1\n  %back = bf16[8,4]{1,0} copy(%here)"
        assert self.read(line)["ff_copies_per_step"] == []
        assert self.read(line, on_chip=None)["ff_copies_per_step"] == ["copy", "slice", "copy"]

    def test_copies_before_the_loop(self):
        text = HLO.replace("  %t = ", "  %b.1 = f32[8,4]{1,0} convert(%b)\n  %t = ").replace("SPOILED", "")
        found = inspect(text, {(8, 4)}, {(1, 2, 6)})
        assert found["ff_copies_per_call"] == ["convert"]

    def test_what_is_no_decode_program(self):
        with pytest.raises(ValueError, match="no ENTRY"):
            inspect("no HLO", set(), set())
        with pytest.raises(ValueError, match="0 loops"):
            inspect("ENTRY %main (a: s32[]) -> s32[] {\n  ROOT %a = s32[] parameter(0)\n}\n", set(), set())

    def test_computations(self):
        module = Module.parse(HLO)
        assert module.entry == "main"
        assert len(module.computations) == 6
        assert module.loop().called == (("condition", "condition"), ("body", "body"))


def test_configs_reach_the_child_as_json():
    config = named("Gemma-2-9B", layers=2)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
