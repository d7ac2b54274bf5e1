"""Small helpers for all other packages: files that are written whole, messages, figures, timing."""
