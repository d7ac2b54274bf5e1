"""The benchmark runner: `python -m benchmarks run` and `memory`."""
