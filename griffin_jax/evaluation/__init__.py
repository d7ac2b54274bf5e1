"""Measures what pruning costs in quality."""
