"""What the library is compared with: Hugging Face's torch models and plain NumPy.

Torch is imported where it is used first, and what uses it is skipped where there is none: the models themselves are
made without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

import griffin_jax as gj

TOLERANCE = 1e-5


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without checks of shapes: lowering a program puts leaves that are no arrays into checked dataclasses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


NO_TORCH = "compares with torch, which is not installed"

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason=NO_TORCH)
"""For tests of what itself asks for torch."""


@functools.cache
def load_torch() -> Any:
    """Torch without gradients; the test that asks for it is skipped where it is not installed."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    torch.set_grad_enabled(False)
    # Two workers with a thread for every core only wait for each other.
    torch.set_num_threads(1)
    return torch


def oracle_squares(z: np.ndarray) -> np.ndarray:
    """s^2 of one sequence, (T, F) -> (F,), as the equation says, in float64."""
    squares = np.zeros(z.shape[1])
    for token in z.astype(np.float64):
        norm = np.sum(token * token)
        if norm > 0:
            squares += token * token / norm
    return squares


def oracle_topk(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest scores, ascending; of equal scores the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:k])


def oracle_positions(length: int, rows: int) -> list[int]:
    """Which tokens stand for a sequence: all, or those in the middles of equal parts."""
    return list(range(length)) if length <= rows else [(2 * i + 1) * length // (2 * rows) for i in range(rows)]


def down_projections(model: Any, name: str = "mlp.down_proj") -> list[Any]:
    return [module for path, module in model.named_modules() if path.endswith(f".{name}")]


def torch_intermediates(model: Any, tokens: Sequence[int], down: str = "mlp.down_proj") -> list[np.ndarray]:
    """z of every layer, (T, F), as the torch model computes it."""
    torch, captured = load_torch(), []

    def capture(_: Any, args: tuple[Any, ...]) -> None:
        # OPT flattens batch and tokens into one axis.
        captured.append(args[0].flatten(0, -2).numpy())

    modules = down_projections(model, down)
    with pre_hooks(modules, [capture] * len(modules)):
        model(torch.tensor([list(tokens)]))
    return captured


@contextlib.contextmanager
def pre_hooks(modules: Sequence[Any], hooks: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Forward pre-hooks that are gone afterwards, also when something fails: tests share their torch models."""
    with contextlib.ExitStack() as stack:
        for module, hook in zip(modules, hooks, strict=True):
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def masking(masks: Sequence[Any]) -> list[Callable[..., Any]]:
    """Hooks that multiply the inputs of modules by these masks."""
    return [lambda _, args, mask=mask: (args[0] * mask,) for mask in masks]


def torch_greedy(
    model: Any,
    tokens: Sequence[int],
    new: int,
    masks: Sequence[np.ndarray] | None = None,
    down: str = "mlp.down_proj",
) -> list[int]:
    """Greedy tokens of the dense torch model, z masked in every step behind the prompt."""
    torch = load_torch()
    # It imports torch, without which other references serve.
    from benchmarks.torchpeers import cache_name

    cache = cache_name(model)
    state = model(torch.tensor([list(tokens)]), use_cache=True)
    modules = [] if masks is None else down_projections(model, down)
    answer = [int(state.logits[0, -1].argmax())]
    with pre_hooks(modules, masking([torch.tensor(np.asarray(mask)) for mask in masks or ()])):
        while len(answer) < new:
            state = model(torch.tensor([answer[-1:]]), use_cache=True, **{cache: getattr(state, cache)})
            answer.append(int(state.logits[0, -1].argmax()))
    return answer


def torch_logits(model: Any, tokens: Sequence[Sequence[int]]) -> np.ndarray:
    return model(load_torch().tensor([list(row) for row in tokens])).logits.numpy()


@jax.jit
def step_logits(
    model: gj.Transformer, tokens: jax.Array, positions: jax.Array, cache: gj.KVCache
) -> tuple[jax.Array, gj.KVCache]:
    x, cache, _ = model(tokens, positions, cache)
    return model.logits(x), cache


def pruned_log_softmax(model: Any, tokens: Sequence[int], dense: int, density: float) -> np.ndarray:
    """log p behind every token, (T, V): the first `dense` are read whole, the rest with the neurons these choose."""
    torch = load_torch()
    if density == 1 or dense >= len(tokens):
        logits = model(torch.tensor([list(tokens)])).logits[0]
    else:
        masks = []
        for z in torch_intermediates(model, tokens[:dense]):
            mask = torch.zeros(z.shape[1])
            mask[oracle_topk(oracle_squares(z), int(z.shape[1] * density))] = 1
            # The prompt is read whole: masks are for what follows it.
            masks.append(torch.cat([torch.ones(dense, len(mask)), mask.expand(len(tokens) - dense, -1)]))
        with pre_hooks(down_projections(model), masking(masks)):
            logits = model(torch.tensor([list(tokens)])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def stepwise_logits(model: gj.Transformer, steps: list[np.ndarray], slots: int) -> np.ndarray:
    """Logits of token columns read step by step through one cache; -1 is padding."""
    batch = steps[0].shape[0]
    context = np.sum([(step >= 0).sum(axis=1) for step in steps], axis=0)
    cache = gj.empty_cache(model.config, batch, slots, context=jnp.asarray(context, jnp.int32))
    logits, lengths = [], np.zeros((batch, 1), np.int32)
    for step in steps:
        real = step >= 0
        positions = np.where(real, lengths + np.cumsum(real, axis=1) - 1, gj.EMPTY).astype(np.int32)
        # Compiled as one: operation by operation takes longer, because every operation is a program to compile.
        found, cache = step_logits(model, np.maximum(step, 0), positions, cache)
        lengths += real.sum(axis=1, keepdims=True, dtype=np.int32)
        logits.append(np.asarray(found))
    return np.concatenate(logits, axis=1)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal to 1e-5, of each logit or of the largest."""
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


def tiny_tokenizer(folder: Path, texts: Sequence[str], size: int) -> None:
    """Writes a byte-level tokenizer of `size` tokens, the first three of which are special, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


@dataclasses.dataclass(frozen=True)
class TinyLlama:
    """The same random weights in torch, when a test asks for it, and in JAX."""

    folder: Path
    llm: Any

    @functools.cached_property
    def torch(self) -> Any:
        load_torch()
        from transformers import LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return LlamaForCausalLM.from_pretrained(self.folder, attn_implementation="eager").eval()

    @classmethod
    def build(cls, folder: Path, **changes: Any) -> TinyLlama:
        config = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32",
            "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "tie_word_embeddings": False, "eos_token_id": 2, "bos_token_id": 1, "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
        }  # fmt: skip
        config |= changes
        (folder / "config.json").write_text(json.dumps(config))
        save_file(random_llama(config), folder / "model.safetensors", {"format": "pt"})
        return cls(folder, gj.load(folder, "float32"))


def random_llama(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of a Llama as Hugging Face names them: (out, in) matrices, float32."""
    random = np.random.default_rng(seed)
    width, ff, heads = (config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = config.get("head_dim", width // heads)
    groups = config["num_key_value_heads"]
    found: dict[str, np.ndarray] = {}

    def draw(name: str, *shape: int, bias: bool = False) -> None:
        found[f"{name}.weight"] = random.normal(0, 0.3, shape).astype(np.float32)
        if bias:
            found[f"{name}.bias"] = random.normal(0, 0.3, shape[0]).astype(np.float32)

    def draw_norm(name: str) -> None:
        found[f"{name}.weight"] = random.uniform(0.5, 1.5, width).astype(np.float32)

    draw("model.embed_tokens", config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        draw_norm(f"{prefix}.input_layernorm")
        draw_norm(f"{prefix}.post_attention_layernorm")
        bias = config.get("attention_bias", False)
        for name, rows in (("q", heads), ("k", groups), ("v", groups)):
            draw(f"{prefix}.self_attn.{name}_proj", rows * head, width, bias=bias)
        draw(f"{prefix}.self_attn.o_proj", width, heads * head, bias=bias)
        bias = config.get("mlp_bias", False)
        for name in ("gate", "up"):
            draw(f"{prefix}.mlp.{name}_proj", ff, width, bias=bias)
        draw(f"{prefix}.mlp.down_proj", width, ff, bias=bias)
    draw_norm("model.norm")
    if not config["tie_word_embeddings"]:
        draw("lm_head", config["vocab_size"], width)
    return found
