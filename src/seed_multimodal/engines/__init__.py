"""Many requests at once: images in common batches, and language models that llama.cpp or a completion server computes."""
