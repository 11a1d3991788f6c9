"""Room `language`: vocabulary, tokenizer, prompt templates, LLM loading and generation, answers. Imports no other room."""
