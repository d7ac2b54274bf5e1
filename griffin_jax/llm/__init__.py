"""A model with its tokenizer, and the four steps joined."""
