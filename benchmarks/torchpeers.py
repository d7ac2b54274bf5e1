"""Peers in PyTorch: transformers' dense model, and GRIFFIN as its authors run it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from griffin_jax import kept_neurons
from griffin_jax.model.assembly import disassemble


class GriffinMLP(nn.Module):
    """The published PyTorch computation, for one gated feed-forward layer of a transformers model.

    A call with more than one token is prefill: it takes the statistic of these tokens, and copies the kept rows (and
    the kept columns of the down projection) into smaller layers. A call with one token decodes with those.
    """

    def __init__(self, mlp: Any, density: float):
        super().__init__()
        self.full, self.density = mlp, density

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mlp = self.full
        if x.shape[1] == 1:
            return self.down(mlp.act_fn(self.gate(x)) * self.up(x))
        z = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        statistic = (z / z.norm(dim=-1, keepdim=True)).norm(dim=1)
        experts = statistic.topk(kept_neurons(z.shape[-1], self.density), dim=-1).indices[0]
        self.gate = _linear(mlp.gate_proj.weight[experts])
        self.up = _linear(mlp.up_proj.weight[experts])
        self.down = _linear(mlp.down_proj.weight[:, experts])
        return mlp.down_proj(z)


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


@contextmanager
def pruned(model: Any, density: float) -> Iterator[Any]:
    """The model with the published GRIFFIN in its feed-forward layers; the dense model for density 1."""
    layers = model.model.layers
    full = [layer.mlp for layer in layers]
    if density < 1:
        for layer in layers:
            layer.mlp = GriffinMLP(layer.mlp, density)
    try:
        yield model
    finally:
        for layer, mlp in zip(layers, full, strict=True):
            layer.mlp = mlp


def cache_name(model: Any) -> str:
    """The name of transformers' argument for the cache: `cache` from 5.24 on; 5.40 will not know the older name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], new: int) -> tuple[list[int], float, float]:
    """Greedy tokens, seconds of prefill, and seconds of each decoded token."""
    cache = cache_name(model)
    start = time.perf_counter()
    state = model(torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
    token = int(state.logits[0, -1].argmax())
    prefilled = time.perf_counter()
    tokens = [token]
    while len(tokens) < new:
        state = model(torch.tensor([[token]]), use_cache=True, **{cache: getattr(state, cache)})
        token = int(state.logits[0, -1].argmax())
        tokens.append(token)
    return tokens, prefilled - start, (time.perf_counter() - prefilled) / max(1, new - 1)


def from_jax(model: Any) -> Any:
    """transformers' Llama with the weights of a griffin_jax model, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    if c.family != "llama" or c.rotary.kind != "default":
        raise ValueError(f"the PyTorch peer is a Llama with plain rotary embedding, the model a {c.family}")
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.ff_width, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim,
        max_position_embeddings=c.max_positions, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied_head,
        hidden_act="gelu_pytorch_tanh" if c.activation == "gelu_tanh" else c.activation,
        attention_bias=c.attention_bias, mlp_bias=c.ff_bias,
        rope_parameters={"rope_type": "default", "rope_theta": c.rotary.theta},
    )  # fmt: skip

    if c.attention_bias or c.ff_bias:
        raise ValueError("the PyTorch peer takes models without biases")
    ours = {path: torch.tensor(np.asarray(array, np.float32)) for path, array in disassemble(model)}
    weights = {"model.embed_tokens.weight": ours["embedding"], "model.norm.weight": ours["norm.scale"]}
    weights["lm_head.weight"] = ours.get("head", ours["embedding"])
    for index in range(c.num_layers):
        mine, theirs = f"layers.{index}.", f"model.layers.{index}."
        weights |= {
            f"{theirs}input_layernorm.weight": ours[f"{mine}attention_norm.scale"],
            f"{theirs}post_attention_layernorm.weight": ours[f"{mine}ff_norm.scale"],
            f"{theirs}self_attn.q_proj.weight": ours[f"{mine}attention.query"].reshape(-1, c.width),
            f"{theirs}self_attn.k_proj.weight": ours[f"{mine}attention.key"].reshape(-1, c.width),
            f"{theirs}self_attn.v_proj.weight": ours[f"{mine}attention.value"].reshape(-1, c.width),
            f"{theirs}self_attn.o_proj.weight": ours[f"{mine}attention.out"].reshape(-1, c.width).T.contiguous(),
            f"{theirs}mlp.gate_proj.weight": ours[f"{mine}ff.gate"],
            f"{theirs}mlp.up_proj.weight": ours[f"{mine}ff.up"],
            f"{theirs}mlp.down_proj.weight": ours[f"{mine}ff.down"].T.contiguous(),
        }
    peer = LlamaForCausalLM(config).eval()
    peer.load_state_dict(weights)
    return peer
