"""Measures how much time pruning gains."""
