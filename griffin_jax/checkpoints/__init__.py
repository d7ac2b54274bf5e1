"""From files to parameters and back: Hugging Face folders, GGUF files, PyTorch's pickles, the native format."""
