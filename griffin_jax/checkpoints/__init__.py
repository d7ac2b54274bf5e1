"""From files to parameters and back: Hugging Face folders, GGUF files, PyTorch pickles, the native format."""
