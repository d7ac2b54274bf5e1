"""What a model needs and can reach on an accelerator that is not there: ahead-of-time compilation."""
