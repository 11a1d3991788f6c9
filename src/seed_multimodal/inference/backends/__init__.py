"""What computes the scores of next tokens: torch, llama.cpp, or a completion server (which chooses tokens itself)."""
