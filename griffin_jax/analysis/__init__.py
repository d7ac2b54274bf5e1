"""Why pruning works: what neurons do in texts."""
