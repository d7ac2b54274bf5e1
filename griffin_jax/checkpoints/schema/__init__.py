"""What a family of models says about its files: attributes, tensors and their layouts."""
