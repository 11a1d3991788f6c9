"""Vocabulary, tokenizers, messages and prompts, loading and merging of LLaMA, generation, streaming, answers."""
