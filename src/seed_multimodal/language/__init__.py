"""Room `language`: vocabulary, tokenizer, prompts, LLM loading, generation, answers. Imports no other room."""
