"""Beyond GRIFFIN: better choices of neurons, refitted rows, lossless and memory-saving decoding; all off by default."""
