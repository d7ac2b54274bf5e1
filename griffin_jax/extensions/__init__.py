"""Beyond GRIFFIN: better choices and better rows at the same cost of decoding; each of them off by default."""
