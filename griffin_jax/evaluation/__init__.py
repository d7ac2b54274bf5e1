"""What pruning costs in quality."""
