"""Matrices of few bits: a model that holds them computes what the numbers that they stand for compute in float32."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_and_slow
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from reference import assert_close

import griffin_jax as gj
from griffin_jax.checkpoints import native
from griffin_jax.checkpoints.verification import dense_logits
from griffin_jax.extensions.in_place import InPlace
from griffin_jax.extensions.refresh import refresh
from griffin_jax.generation import jitted
from griffin_jax.generation.decode import decode, init_decode
from griffin_jax.griffin.masked import mask
from griffin_jax.griffin.select import magnitude
from griffin_jax.model import products
from griffin_jax.model.assembly import OUTPUTS_LAST, assemble, disassemble, random_model
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.sharding import dotted
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.weights import Precision, WeightFormat, dequantise, quantise, stored_bytes
from griffin_jax.parallel.mesh import make_mesh

TINY = ModelConfig(
    family="llama", vocab_size=101, width=32, ff_width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=256,
)  # fmt: skip
FORMATS = first_and_slow(1, "int4:16", "int8", "int8:16", "int4")


def floats(model: gj.Transformer) -> dict[str, np.ndarray]:
    """What the parameters of a model stand for, in float32."""
    arrays = dict(disassemble(model))
    found = {}
    for path, array in arrays.items():
        if path.endswith("_scale"):
            continue
        scale = arrays.get(f"{path}_scale", arrays.get(f"{path}_row_scale"))
        array = np.asarray(array).astype(np.float32)
        if scale is not None:
            wide = np.asarray(scale, np.float32)
            wide = wide if wide.ndim == 1 else np.repeat(wide, array.shape[-1] // wide.shape[-1], axis=-1)
            array = array * wide
        found[path] = array
    return found


def in_floats(model: gj.Transformer) -> gj.Transformer:
    return assemble(model.config, floats(model).items(), jnp.float32)


@pytest.fixture(scope="module", params=FORMATS)
def pair(request) -> tuple[gj.Transformer, gj.Transformer]:
    """A model of integers, and of what they stand for."""
    model = random_model(TINY, weights=WeightFormat.parse(request.param))
    return model, in_floats(model)


@pytest.fixture
def prompts(rng) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(rng.integers(3, 101, (2, 16)), jnp.int32), jnp.asarray([16, 9])


def same_leaves(mine, theirs) -> None:
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert_close(np.asarray(one), np.asarray(other))


class TestQuantise:
    def test_outputs(self, rng):
        w = rng.normal(size=(24, 40)).astype(np.float32)
        for outputs, axis in (("first", 1), ("last", 0)):
            numbers, scale = quantise(w, WeightFormat("int8"), outputs)
            expected = np.abs(w).max(axis=axis, keepdims=True) / np.float32(127)
            np.testing.assert_allclose(np.asarray(scale).reshape(expected.shape), expected, rtol=1e-6)
            assert np.abs(np.asarray(numbers) - w / expected).max() <= 0.5 + 1e-4
            assert scale.shape == ((24, 1) if outputs == "first" else (40,))
            assert_close(np.asarray(dequantise(numbers, scale)), np.asarray(numbers) * expected)

    def test_outputs_of_each_of_several_matrices(self, rng):
        w = rng.normal(size=(3, 24, 40)).astype(np.float32)
        numbers, scale = quantise(w, WeightFormat("int8"), "last_of_each")
        alone = [dequantise(*quantise(matrix, WeightFormat("int8"), "last")) for matrix in w]
        np.testing.assert_array_equal(dequantise(numbers, scale), np.stack(alone))

    @pytest.mark.parametrize(("kind", "format"), [("Q8_0", "int8:32"), ("Q4_0", "int4:32")])
    def test_what_llama_cpp_stores_is_kept(self, rng, kind, format):
        stored = quantize(rng.normal(size=(24, 96)).astype(np.float32), GGMLQuantizationType[kind])
        w = dequantize(stored, GGMLQuantizationType[kind])
        np.testing.assert_array_equal(dequantise(*quantise(w, WeightFormat.parse(format))), w)

    def test_four_bits_err_less_than_llama_cpp(self, rng):
        w = rng.standard_t(4, size=(64, 512)).astype(np.float32)
        theirs = dequantize(quantize(w, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
        ours = np.asarray(dequantise(*quantise(w, WeightFormat("int4", 32))))
        assert np.square(ours - w).mean() < np.square(theirs - w).mean()

    def test_zeros_and_tiny_numbers(self):
        for format in ("int8", "int8:16", "int4:16"):
            w = np.zeros((3, 32), np.float32)
            w[1], w[2, 0] = 1e-12, 3.0
            numbers, scale = quantise(w, WeightFormat.parse(format))
            assert np.isfinite(np.asarray(scale, np.float32)).all()
            np.testing.assert_allclose(dequantise(numbers, scale), np.where(w == 3, 3, 0), atol=1e-3)

    def test_formats(self):
        for text in ("int8", "int8:64", "int4", "int4:64", "bfloat16", "float32"):
            assert str(WeightFormat.parse(text)) == text
        assert WeightFormat.parse("int4").group == 32
        assert WeightFormat.parse(jnp.bfloat16) == WeightFormat("bfloat16")
        assert (WeightFormat.parse("int4").bits, WeightFormat.parse("int8").bits) == (4.5, 8)
        for text in ("int5", "int8:", "int8:1", "int4:x", "bfloat16:32", "8"):
            with pytest.raises(ValueError, match=r"weights are '.*'; allowed are float32"):
                WeightFormat.parse(text)


class TestProducts:
    """Each form against plain NumPy, for one token, for few and for many."""

    @pytest.mark.parametrize("format", first_and_slow(3, "int8", "int4:16", "bfloat16", "int8:16", "float16"))
    @pytest.mark.parametrize("tokens", [1, 3, products.FUSED_TOKENS + 1])
    @pytest.mark.parametrize("size", first_and_slow(2, (1100, 64), (5, 64), (13, 5120)))
    def test_linear_and_matmul(self, rng, format, tokens, size):
        format, w = WeightFormat.parse(format), rng.normal(size=size).astype(np.float32)
        for name, outputs, shape in (
            ("linear", "first", (1, tokens, size[1])),
            ("matmul", "last", (1, tokens, size[0])),
        ):
            x = rng.normal(size=shape).astype(np.float32)
            if format.quantised:
                numbers, scale = quantise(w, format, outputs)
                wide = np.asarray(dequantise(numbers, scale))
            else:
                numbers, scale = jnp.asarray(w, format.dtype), None
                wide = np.asarray(numbers, np.float32)
            by_rows = name == "matmul" and format.group is not None
            scales = (None, scale) if by_rows else (scale,)
            expected = x.astype(np.float64) @ (wide.T if name == "linear" else wide)
            got = jax.jit(getattr(products, name))(x, numbers, *scales)
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(x).sum(-1).max())
            other = products._as_it_is if name == "linear" else products._matmul_as_it_is
            keywords = {"dtype": np.dtype(np.float32)} if name == "linear" else {}
            padded = scales if name == "linear" else (*scales, None)[:2]
            also = other(x, numbers, *padded, **keywords)
            np.testing.assert_allclose(also, expected, rtol=0, atol=2e-6 * np.abs(x).sum(-1).max())

    @pytest.mark.parametrize("width", [4095, 4096, 5120, 8193, 8194, 16_386])
    def test_long_vectors_times_bfloat16(self, rng, width):
        """In one part, two, three, and where no few equal parts are short enough as a sum."""
        w, x = jnp.asarray(rng.normal(size=(7, width)), jnp.bfloat16), rng.normal(size=(1, 1, width)).astype(np.float32)
        expected = x.astype(np.float64) @ np.asarray(w, np.float64).T
        got = jax.jit(products.linear)(x, w)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(x).sum())

    @pytest.mark.skipif(products.DOTS_NEED_FLOATS, reason="this jax needs blocks of rows in memory")
    @pytest.mark.parametrize("format", ["int8", "bfloat16"])
    @pytest.mark.parametrize("size", [(1000, 1024), (100, 8192), (64, 18_000)], ids=["one part", "two", "a sum"])
    def test_a_token_converts_no_matrix_in_memory(self, format, size):
        numbers, scale = jnp.zeros(size, format), jnp.ones((size[0], 1)) if format == "int8" else None
        token = jnp.zeros((1, 1, size[1]), jnp.float32)
        found = jax.jit(products.linear).lower(token, numbers, scale).compile().memory_analysis()
        assert found is not None
        assert found.temp_size_in_bytes < numbers.size

    @pytest.mark.thorough
    def test_no_step_reads_more_than_is_stored(self, shapes_for_arrays):
        model = random_model(TINY, weights=WeightFormat("int8"))
        state = init_decode(gj.prefill(model, jnp.ones((1, 8), jnp.int32), jnp.asarray([8]), max_new_tokens=8))
        sizes = jax.jit(decode).lower(model, state, jnp.int32(8)).compile().memory_analysis()
        assert sizes is not None
        # Not as much as one matrix in float32.
        assert sizes.temp_size_in_bytes < 4 * 2 * TINY.ff_width * TINY.width * TINY.num_layers

    @pytest.mark.skipif(products.DOTS_NEED_FLOATS, reason="this jax needs blocks of rows in memory")
    @pytest.mark.parametrize("weights", ["bfloat16", "int4:32"])
    def test_no_matrix_is_converted_for_a_bias(self, rng, weights):
        """One that is added to what is then used twice, as a head's is."""
        numbers = jnp.asarray(rng.normal(size=(2048, 64)), jnp.bfloat16)
        matrix, scale = numbers, None
        if weights != "bfloat16":
            matrix, scale = quantise(numbers.astype(jnp.float32), WeightFormat.parse(weights), "first")

        def step(x, matrix, scale, bias):
            logits = products.linear(x, matrix, scale) + bias
            return jnp.max(logits), jax.nn.softmax(logits)

        given = jnp.ones((1, 1, 64)), matrix, scale, jnp.ones(2048)
        sizes = jax.jit(step).lower(*given).compile().memory_analysis()
        assert sizes is not None
        assert sizes.temp_size_in_bytes < 4 * numbers.size / 2

    @pytest.mark.skipif(not products.DOTS_FUSE, reason="this jax multiplies blocks of rows, in a loop")
    @pytest.mark.parametrize("tokens", [1, 3])
    def test_a_norm_is_not_computed_again_for_every_row(self, tokens):
        """A product with converted numbers takes the matrix and a vector, and nothing that the vector comes from."""
        layer = random_model(TINY, weights=WeightFormat("int8")).layers[0]
        x = jnp.ones((1, tokens, TINY.width))
        text = jax.jit(lambda layer, x: layer.ff.intermediate(layer.ff_norm(x))).lower(layer, x).compile().as_text()
        fused = [part for part in text.split("\n\n") if " dot(" in part and "s8[" in part and "ENTRY" not in part]
        assert len(fused) == tokens
        for part in fused:
            assert part.count(" parameter(") == 2


class TestModels:
    @pytest.mark.thorough
    def test_logits_statistics_and_tokens(self, pair, prompts):
        mine, theirs = pair
        assert_close(np.asarray(dense_logits(mine, prompts[0])), np.asarray(dense_logits(theirs, prompts[0])))
        read = [jitted.prefill(model, *prompts, max_new_tokens=8) for model in pair]
        for one, other in zip(*(p.statistics.squares for p in read), strict=True):
            assert_close(np.asarray(one), np.asarray(other))
        tokens = [np.asarray(jitted.decode(m, init_decode(p), 8).tokens) for m, p in zip(pair, read, strict=True)]
        np.testing.assert_array_equal(*tokens)
        for one, other in zip(magnitude(mine), magnitude(theirs), strict=True):
            assert_close(np.asarray(one), np.asarray(other))

    @pytest.mark.thorough
    @pytest.mark.parametrize("shared", [True, False])
    def test_pruned_and_masked(self, pair, prompts, shared):
        found = []
        for model in pair:
            read = jitted.prefill(model, *prompts, max_new_tokens=8)
            experts = gj.select(read.statistics, gj.GriffinConfig(0.5, shared=shared))
            pruned, masked = gj.prune(model, experts), mask(model, experts)
            hidden = [
                jitted.teacher_force(m, read, prompts[0][:, :4], jnp.asarray([4, 3]))[0] for m in (pruned, masked)
            ]
            assert_close(np.asarray(hidden[0]), np.asarray(hidden[1]))
            tokens = jitted.decode(pruned, init_decode(read), 8).tokens
            found.append((experts, np.asarray(tokens), np.asarray(hidden[0])))
        (experts, tokens, hidden), (others, theirs, expected) = found
        for one, other in zip(experts, others, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(tokens, theirs)
        assert_close(hidden, expected)

    def test_rows_and_their_scales_move_together(self, pair, rng):
        model, _ = pair
        index = [np.sort(rng.choice(48, 24, replace=False)) for _ in range(2)]
        pruned = gj.prune(model, gj.ExpertNeurons.from_indices(index, model.neurons))
        for layer, kept, own in zip(model.layers, pruned.layers, index, strict=True):
            np.testing.assert_array_equal(kept.ff.down_matrix(), layer.ff.down_matrix()[own])
            np.testing.assert_array_equal(kept.ff.gate_up_matrix(), layer.ff.gate_up_matrix()[:, own])
        assert pruned.ff_bytes == model.ff_bytes // 2

    @pytest.mark.parametrize("shared", first_and_slow(1, False, True))
    def test_refitted_rows_are_rounded_again(self, pair, prompts, shared):
        mine, theirs = pair
        reads = [jitted.prefill(model, *prompts, max_new_tokens=8, rows=12) for model in pair]
        experts = gj.select(reads[1].statistics, gj.GriffinConfig(0.5, shared=shared))
        got = gj.prune(mine, experts, refit=gj.Reconstruction(reads[1].rows))
        wanted = gj.prune(theirs, experts, refit=gj.Reconstruction(reads[1].rows))
        plain = gj.prune(theirs, experts)
        for layer, float_layer, before in zip(got.layers, wanted.layers, plain.layers, strict=True):
            expected, rows = np.asarray(float_layer.ff.down_matrix()), np.asarray(layer.ff.down_matrix())
            assert layer.ff.down.dtype == mine.layers[0].ff.down.dtype
            sets = [(rows, expected)] if shared else zip(rows, expected, strict=True)
            for row, want in sets:
                rounded = dequantise(*quantise(jnp.asarray(want), mine.weights, "last"))
                # Where a number lies between two integers, float32 may take either.
                assert (np.abs(row - np.asarray(rounded)) > 1e-5).mean() < 0.01
            assert np.abs(rows - expected).mean() < np.abs(np.asarray(before.ff.down_matrix()) - expected).mean()

    def test_in_place(self, pair, prompts):
        mine, theirs = pair
        read = jitted.prefill(mine, *prompts, max_new_tokens=0)
        experts = gj.select(read.statistics, gj.GriffinConfig(0.5, shared=True))
        copy = jax.tree.map(jnp.copy, mine)
        held = InPlace(copy)
        pruned = held.prune(experts)
        same_leaves(
            [x.ff.down_matrix() for x in pruned.layers], [x.ff.down_matrix() for x in gj.prune(mine, experts).layers]
        )
        assert_close(np.asarray(dense_logits(held.model, prompts[0])), np.asarray(dense_logits(theirs, prompts[0])))

    @pytest.mark.slow
    @pytest.mark.parametrize("pair", ["int8", "int4:16"], indirect=True)
    def test_refresh_and_speculation(self, pair, prompts):
        found = []
        for model in pair:
            read = jitted.prefill(model, *prompts, max_new_tokens=16)
            pruned = gj.prune(model, gj.select(read.statistics, gj.GriffinConfig(0.5)))
            state = decode(pruned, init_decode(read), 6)
            state, statistics, _ = refresh(model, state, read.statistics, 6)
            lossless, _ = gj.decode_speculative(model, pruned, init_decode(read), 8, drafts=3)
            dense = jitted.decode(model, init_decode(read), 8)
            np.testing.assert_array_equal(lossless.tokens[:, :8], dense.tokens[:, :8])
            found.append((np.asarray(state.tokens), [np.asarray(s) for s in statistics.squares]))
        np.testing.assert_array_equal(found[0][0], found[1][0])
        same_leaves(found[0][1], found[1][1])

    @pytest.mark.thorough
    @pytest.mark.parametrize("pair", first_and_slow(1, "int8", "int4:16"), indirect=True)
    @pytest.mark.parametrize(("data", "model"), [(1, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
    def test_mesh(self, pair, prompts, data, model):
        mine, theirs = pair
        mesh = make_mesh(data=data, model=model)
        divided = random_model(TINY, mesh=mesh, weights=mine.weights)
        llms = [gj.LLM(divided, None, "on a mesh"), gj.LLM(theirs, None, "in floats")]
        rows = [np.asarray(prompts[0][0]).tolist(), np.asarray(prompts[0][1]).tolist()]
        options = {"max_new_tokens": 8, "density": 0.5, "ignore_eos": True}
        got, expected = (llm.generate(rows, groups=1, **options).tokens for llm in llms)
        assert got == expected

    def test_fingerprints_differ(self, pair):
        prints = {fingerprint(model) for model in pair}
        assert len(prints) == 2
        assert fingerprint(random_model(TINY, weights=pair[0].weights)) in prints

    def test_sizes_are_counted(self, pair):
        model, _ = pair
        sizes = Sizes(TINY, 1, 8, Precision.of(model.dtype, model.weights), shared=True)

        def stored(path: jax.tree_util.KeyPath, leaf: jax.Array) -> int:
            # However a CPU holds them.
            kind = model.weights.dtype_of(dotted(path)) if leaf.dtype == jnp.int8 else leaf.dtype
            return stored_bytes(leaf.shape, kind)

        assert sizes.weights(None) == sum(stored(*leaf) for leaf in jax.tree.leaves_with_path(model))
        assert sizes.ff(None) == model.ff_bytes
        pruned = gj.prune(model, gj.ExpertNeurons.from_indices([np.arange(24)] * 2, model.neurons))
        assert sizes.ff([24] * 2) == pruned.ff_bytes

    def test_on_a_cpu_numbers_of_4_bits_are_bytes(self, pair):
        """And the model is the same as with numbers of 4 bits, on whichever device."""
        model, _ = pair
        assert not any(leaf.dtype == jnp.int4 for leaf in jax.tree.leaves(model))

        def few(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
            return leaf.astype(model.weights.dtype_of(dotted(path))) if leaf.dtype == jnp.int8 else leaf

        packed = jax.tree.map_with_path(few, model)
        assert any(leaf.dtype == jnp.int4 for leaf in jax.tree.leaves(packed)) == (model.weights.dtype == "int4")
        assert fingerprint(packed) == fingerprint(model)
        x = jax.random.normal(jax.random.key(0), (1, 1, 32))
        assert_close(np.asarray(packed.layers[0].ff(x)), np.asarray(model.layers[0].ff(x)))


class TestSixteenBits:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_stored_and_multiplied_in_float32(self, prompts, dtype):
        model = random_model(TINY, weights=WeightFormat(dtype))
        assert model.layers[0].ff.down.dtype == dtype
        assert model.layers[0].ff_norm.scale.dtype == model.dtype == jnp.float32
        got, expected = (np.asarray(dense_logits(m, prompts[0])) for m in (model, in_floats(model)))
        assert_close(got, expected)

    @pytest.mark.thorough
    def test_tokens_of_a_pruned_model(self, prompts):
        model = random_model(TINY, weights=WeightFormat("bfloat16"))
        llms = [gj.LLM(m, None, "one") for m in (model, in_floats(model))]
        row = np.asarray(prompts[0][0]).tolist()
        mine, theirs = (llm.generate([row], density=0.5, max_new_tokens=8, ignore_eos=True).tokens for llm in llms)
        assert mine == theirs


class TestCheckpoints:
    @pytest.mark.thorough
    @pytest.mark.filterwarnings("ignore::griffin_jax.checkpoints.planning.NarrowingWarning")
    @pytest.mark.parametrize("weights", first_and_slow(1, "int4:16", "int8", "int8:16", "bfloat16"))
    def test_loaded_converted_and_saved_alike(self, tiny, tmp_path, prompts, weights):
        loaded = gj.load(tiny.folder, "float32", weights=weights)
        gj.convert(tiny.folder, tmp_path / "converted", dtype="float32", weights=weights, progress=False)
        native.save(loaded.model, tmp_path / "saved")
        logits = np.asarray(dense_logits(loaded.model, prompts[0]))
        for name in ("converted", "saved"):
            again = gj.load(tmp_path / name, "float32", weights=weights if weights == "bfloat16" else None)
            assert str(again.model.weights) == weights
            np.testing.assert_array_equal(np.asarray(dense_logits(again.model, prompts[0])), logits)
        if weights == "bfloat16":
            return
        assert json.loads((tmp_path / "saved" / native.MANIFEST).read_text())["version"] == 3
        # What it stands for, and from there to other integers.
        wide = gj.load(tmp_path / "converted", "float32", weights="float32").model
        for (path, one), (_, other) in zip(
            sorted(disassemble(wide)), sorted(floats(loaded.model).items()), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-7, err_msg=path)
        assert str(gj.load(tmp_path / "converted", weights="int8:8").model.weights) == "int8:8"

    @pytest.mark.parametrize("weights", ["int8", "int4:16"])
    def test_on_a_mesh(self, tiny, tmp_path, prompts, weights):
        gj.convert(tiny.folder, tmp_path / "converted", dtype="float32", weights=weights, progress=False)
        expected = np.asarray(dense_logits(gj.load(tmp_path / "converted").model, prompts[0]))
        for source, options in ((tmp_path / "converted", {}), (tiny.folder, {"weights": weights})):
            model = gj.load(source, "float32", mesh=make_mesh(model=2), **options).model
            assert len(model.layers[0].ff.down[...].sharding.device_set) == 2
            assert_close(np.asarray(dense_logits(model, prompts[0])), expected)

    def test_a_folder_is_as_small_as_its_weights(self, tiny, tmp_path):
        sizes = {}
        for weights in ("float32", "int8", "int4:16"):
            report = gj.convert(tiny.folder, tmp_path / weights[:4], dtype="float32", weights=weights, progress=False)
            model = gj.load(tmp_path / weights[:4]).model
            precision = Precision.of(model.dtype, model.weights)
            assert report.bytes == Sizes(model.config, 1, 1, precision, shared=True).weights(None)
            sizes[weights] = report.bytes
        assert sizes["int4:16"] < sizes["int8"] < sizes["float32"] / 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": "int4:24"}, r"groups of 24 do not divide rows of 32 weights; possible are 16, 32"),
            ({"weights": "int3"}, r"weights are 'int3'; allowed are float32, bfloat16, float16, int8, int4"),
            ({"weights": "int8", "dtype": "int8"}, r"dtype is 'int8'; allowed are float32"),
        ],
    )
    def test_refusals(self, tiny, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            gj.load(tiny.folder, **options)
        with pytest.raises(ValueError, match=message):
            gj.convert(tiny.folder, tmp_path / "never", **options)
        assert not (tmp_path / "never").exists()

    def test_verification_is_of_exact_conversions(self, tiny, tmp_path):
        with pytest.raises(ValueError, match="int8 rounds by design"):
            gj.convert(tiny.folder, tmp_path / "never", weights="int8", verify=True)

    def test_a_manifest_that_says_something_else(self, tiny, tmp_path):
        gj.convert(tiny.folder, tmp_path / "n", weights="int8", progress=False)
        path = tmp_path / "n" / native.MANIFEST
        for changes, message in (
            ({"weights": "int4:16"}, "the parameters are not those of its config"),
            ({"weights": "bfloat16"}, "weights of bfloat16 in a folder of version 3"),
            ({"weights": 3}, "weights are '3'"),
            ({"weights": "int8:5"}, "groups of 5 do not divide rows of 32"),
        ):
            manifest = json.loads(path.read_text())
            path.write_text(json.dumps(native.sealed(manifest | changes)))
            with pytest.raises(ValueError, match=message):
                gj.load(tmp_path / "n")
            path.write_text(json.dumps(manifest))


def test_command_line(tiny, tmp_path, capsys):
    from griffin_jax.cli.main import main

    assert main(["convert", str(tiny.folder), str(tmp_path / "n"), "--weights", "int8"]) == 0
    assert "in int8 in float32" in capsys.readouterr().out
    assert main(["info", "--model", str(tmp_path / "n")]) == 0
    assert "stored in int8 in float32" in capsys.readouterr().out
    assert main(["info", "--model", str(tmp_path / "n"), "--json", "--weights", "int4:16"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == "int4:16"
    assert main(["convert", str(tiny.folder), "--dry-run", "--weights", "int4:16"]) == 0
    out = capsys.readouterr().out
    assert "F32 -> int4" in out
    assert "F32 -> int8" in out
    assert main(["info", "--model", str(tiny.folder), "--weights", "int4:7"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "griffin-jax info: groups of 7 do not divide rows of 32 weights; possible are 16, 32"
    ]


@pytest.mark.thorough
def test_scales_belong_to_their_matrices():
    """The paths of scales are those that rules of sharding and the native format know."""
    for text in ("int8", "int8:16", "int4:16"):
        model = random_model(TINY, weights=WeightFormat.parse(text))
        names = {path.rpartition(".")[-1] for path, _ in disassemble(model) if path.endswith("_scale")}
        by_rows = {f"{name}_{'scale' if text == 'int8' else 'row_scale'}" for name in OUTPUTS_LAST}
        rest = {"query_scale", "key_scale", "value_scale", "gate_scale", "up_scale", "embedding_scale"}
        assert names == by_rows | rest | ({"head_scale"} if not TINY.tied_head else set())
