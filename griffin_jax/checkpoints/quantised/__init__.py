"""Quantised safetensors, as they are published: which parts make a tensor, and what its numbers mean."""
