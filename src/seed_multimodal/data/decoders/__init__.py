"""Records -> token sequences of the language model, by the name of the decoder."""
