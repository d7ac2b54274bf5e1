"""What a model needs and can reach on a chip that you don't have: ahead-of-time compilation."""
