"""What pruning gains in time."""
