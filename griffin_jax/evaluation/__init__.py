"""Whether the pruned model still answers well: `griffin-jax eval`."""
