"""The benchmark runner: `python -m benchmarks run`, `quality` and `memory`."""
