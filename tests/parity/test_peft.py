"""Adapters against PEFT's torch results: outputs, gradients and files, for separate and fused linear layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_and_slow
from reference import assert_close, load_torch

import griffin_jax as gj
from griffin_jax.adapters.adapter import Adapter, Factors, attach, merge
from griffin_jax.adapters.config import AdapterConfig
from griffin_jax.adapters.peft import load_adapter, save_adapter

ENDS = {"bos_token_id": 1, "eos_token_id": 2}
SIZES = {**ENDS, "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 2, "intermediate_size": 24},
    # Inputs first, and queries, keys and values as one layer.
    "gpt2": {**ENDS, "vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    # Fused, with gate and up as another one.
    "phi3": {**SIZES, "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0},
    # Each head's query, key and value next to each other.
    "gpt_neox": {**SIZES, "intermediate_size": 24, "rotary_pct": 1.0},
}
TOKENS = np.random.default_rng(3).integers(1, 61, (2, 9))


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A tiny model with an adapter of PEFT, in torch and in files."""

    torch: Any
    model: gj.Transformer
    folder: Path


@pytest.fixture(scope="module", params=first_and_slow(2, "gpt2", "phi3", "llama", "gpt_neox"))
def both(request, tmp_path_factory) -> Adapted:
    torch, peft = load_torch(), pytest.importorskip("peft", reason="compares with peft, which is not installed")
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **FAMILIES[request.param])).eval()
    plain.save_pretrained(folder / "base")
    options = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(plain, options).eval()
    adapted.save_pretrained(folder / "adapter")
    return Adapted(adapted, gj.load(folder / "base", "float32").model, folder / "adapter")


@jax.jit
def logits(model: gj.Transformer) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape)
    cache = gj.empty_cache(model.config, *TOKENS.shape, model.dtype)
    hidden, _, _ = model(jnp.asarray(TOKENS, jnp.int32), positions, cache, read_slots=0)
    return model.logits(hidden)


def test_logits_and_gradients(both):
    torch = load_torch()
    adapter = load_adapter(both.folder, both.model.config)
    with torch.enable_grad():
        expected = both.torch(torch.tensor(TOKENS)).logits
        both.torch.zero_grad()
        expected.square().mean().backward()
    assert_close(np.asarray(jax.jit(lambda a: logits(attach(both.model, a)))(adapter)), expected.detach().numpy())
    plain = np.asarray(logits(both.model))
    assert np.abs(plain - expected.detach().numpy()).max() > 100 * 1e-5 * np.abs(plain).max()

    found = jax.jit(jax.grad(lambda a: jnp.mean(jnp.square(logits(attach(both.model, a))))))(adapter)
    compared = 0
    for name, parameter in both.torch.named_parameters():
        if parameter.grad is None:
            continue
        module, _, factor = name.replace(".default", "").removeprefix("base_model.model.").partition(".lora_")
        own = found.factors[module].a if factor.startswith("A") else found.factors[module].b
        assert_close(np.asarray(own), parameter.grad.numpy())
        compared += 1
    assert compared == 2 * len(adapter.factors)


def test_merged_it_computes_the_same(both):
    expected = both.torch(load_torch().tensor(TOKENS)).logits.numpy()
    assert_close(np.asarray(logits(merge(attach(both.model, load_adapter(both.folder, both.model.config))))), expected)


def test_peft_loads_what_is_written_here(both, tmp_path):
    torch, peft = load_torch(), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = both.model.config
    adapter = Adapter.init(config, AdapterConfig(rank=2, alpha=7.0, targets="attention"), jax.random.key(1))
    draw = np.random.default_rng(4).normal
    adapter = dataclasses.replace(
        adapter,
        factors={
            n: Factors(f.a, jnp.asarray(draw(0, 0.3, f.b.shape), jnp.float32)) for n, f in adapter.factors.items()
        },
    )
    save_adapter(adapter, tmp_path / "adapter", config, base="anything")
    base = AutoModelForCausalLM.from_pretrained(both.folder.parent / "base", dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(np.asarray(logits(attach(both.model, adapter))), theirs(torch.tensor(TOKENS)).logits.numpy())
    again = load_adapter(tmp_path / "adapter", config)
    assert again.scale == adapter.scale
    for name, factors in adapter.factors.items():
        np.testing.assert_array_equal(again.factors[name].a, factors.a)
        np.testing.assert_array_equal(again.factors[name].b, factors.b)
