"""Batching of image requests, and language models outside of torch (llama.cpp, completion servers)."""
