"""Speed: every operation and the models against NumPy and, where installed, torch, transformers and llama.cpp."""
