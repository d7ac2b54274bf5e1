"""Why pruning works: what neurons and experts do in texts."""
