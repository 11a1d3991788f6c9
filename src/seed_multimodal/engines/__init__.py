"""Many requests at once: common batches of images, and language models outside torch (llama.cpp, completion
servers)."""
