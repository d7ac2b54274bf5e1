"""Small helpers for all other packages: files that are written whole or not at all, messages, figures, timing."""
