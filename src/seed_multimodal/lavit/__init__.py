"""LaVIT: images as a variable number of tokens for a language model."""
