"""Whose tiny models are checked on an accelerator; apart, so that who names them loads no JAX."""

FAMILIES = ("Gemma-2-9B", "Llama-3-8B", "Qwen2.5-7B", "Qwen3-8B", "OPT-6.7B")
"""Windows, soft caps and norms of two kinds; grouped heads; biases; norms of heads; no gate, and learned positions."""
