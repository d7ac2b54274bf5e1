"""Text to tokens and back, also while an answer is being written."""
