"""Times the same shapes in PyTorch on the same device: transformers at its fastest, and GRIFFIN as its authors run it.

transformers decodes with a static cache and a compiled step (CUDA graphs). The published computation
(`benchmarks.torchpeers.GriffinMLP`) copies the kept rows for every prompt, which a compiled step does not allow. It
decodes uncompiled, and is compared with the dense model run in the same way. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from griffin_jax.cli.options import numbers
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.named import named
from griffin_jax.utils.wholefile import write_text

COMPILED, EAGER, PUBLISHED = "transformers, compiled", "transformers", "published GRIFFIN"


def build(config: ModelConfig, dtype: Any, device: Any) -> Any:
    """transformers' model of this architecture, with random weights.

    Raises:
        ValueError: the architecture is neither a Llama nor a Gemma.
    """
    import torch
    import transformers

    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, "silu"),
        "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, "gelu_pytorch_tanh"),
    }
    if config.family not in kinds or config.rotary is None:
        raise ValueError(f"the peers in PyTorch are Llama and Gemma, not {config.family}")
    make_config, make_model, activation = kinds[config.family]
    settings = make_config(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.ff_width,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_positions, tie_word_embeddings=config.tied_head, hidden_act=activation,
    )  # fmt: skip
    with torch.device("meta"):
        model = make_model(settings)
    model = model.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
        # The rotary frequencies were made with the model, on the meta device, so they have no values yet.
        rotary = model.model.rotary_emb
        frequencies = config.rotary.theta ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
        for name in ("inv_freq", "original_inv_freq"):
            if hasattr(rotary, name):
                setattr(rotary, name, frequencies.float())
    model.tie_weights()
    return model


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(step: Callable[[], Any]) -> tuple[Any, float]:
    _synchronise()
    start = time.perf_counter()
    found = step()
    _synchronise()
    return found, time.perf_counter() - start


def greedy(model: Any, prompts: np.ndarray, new: int, step: Any = None) -> tuple[list[list[int]], float, float]:
    """Greedy tokens of each row, seconds of prefill, and seconds of each decoded token of the batch.

    Args:
        model: a model of transformers.
        prompts: tokens (B, T).
        new: number of tokens of each answer.
        step: the model's compiled `forward`, which decodes with a static cache; None decodes without compiling.
    """
    import torch
    import transformers

    from benchmarks.torchpeers import cache_name

    device = next(model.parameters()).device
    tokens, length = torch.tensor(prompts, device=device), prompts.shape[1]
    if step is None:
        cache: Any = transformers.DynamicCache(config=model.config)
    else:
        cache = transformers.StaticCache(config=model.config, max_cache_len=length + new)

    kept = {cache_name(model): cache, "use_cache": True}

    def read() -> Any:
        # A prompt is read only once, so compiling this would take longer.
        return model(tokens, logits_to_keep=1, **kept).logits[:, -1:].argmax(-1)

    def write(newest: Any) -> list[Any]:
        written = [newest]
        for _ in range(new - 1):
            state = (step or model)(written[-1], **kept)
            # The next compiled step reuses the memory of this one's result.
            written.append(state.logits[:, -1:].argmax(-1).clone())
        return written

    with torch.inference_mode():
        newest, prefill = _seconds(read)
        written, decode = _seconds(lambda: write(newest))
    return torch.cat(written, dim=1).tolist(), prefill, decode / (new - 1)


def measure(
    config: ModelConfig, batch: int, prompt: int, new: int, densities: list[float], repeats: int, dtype: str
) -> list[dict[str, Any]]:
    """One row for each system and density: medians in milliseconds, after a warm-up round."""
    import torch

    from benchmarks import torchpeers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(config, getattr(torch, dtype), device)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, prompt))
    # The published code chooses neurons for the first sequence only.
    pruned = [(PUBLISHED, density, None) for density in densities if density < 1 and batch == 1]
    compiled = torch.compile(model.forward, mode="reduce-overhead" if device.type == "cuda" else "default")
    rows = []
    for system, density, step in [(COMPILED, 1.0, compiled), (EAGER, 1.0, None), *pruned]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with torchpeers.pruned(model, density):
            samples = [greedy(model, prompts, new, step)[1:] for _ in range(repeats + 1)][1:]
        prefill, token = (float(np.median(times)) * 1e3 for times in zip(*samples, strict=True))
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        work = {"batch": batch, "prompt": prompt, "new": new, "density": density}
        times = {"prefill_ms": prefill, "decode_ms": token}
        rows.append({"system": system, **work, **times, "device_memory": memory})
    dense = rows[1]["decode_ms"]
    return [row | {"speedup": None if row["system"] == COMPILED else dense / row["decode_ms"]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_torch", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--lengths", default="2048+128")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--density", default="1,0.75,0.5,0.25")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json-file", type=Path, required=True)
    options = parser.parse_args()
    import torch
    import transformers

    # transformers renames arguments from version to version; this has to work with many versions.
    warnings.simplefilter("ignore", FutureWarning)
    prompt, new = map(int, options.lengths.split("+"))
    densities = numbers("--density", options.density, float)
    rows = measure(
        named(options.model, options.layers), options.batch, prompt, new, densities, options.repeats, options.dtype
    )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result = {"format": "griffin_jax torch peers 1", "model": options.model, "dtype": options.dtype, **versions}
    write_text(options.json_file, json.dumps(result | {"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
