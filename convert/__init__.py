"""Conversion of checkpoints: `python -m convert` in a checkout; once installed, `griffin-jax convert`."""
