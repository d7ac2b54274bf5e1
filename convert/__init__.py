"""Conversion of checkpoints, run as `python -m convert` in a checkout; `griffin-jax convert` where installed."""
