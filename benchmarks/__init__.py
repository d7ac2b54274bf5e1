"""The benchmark runner: `python -m benchmarks run`, `memory` and others."""
