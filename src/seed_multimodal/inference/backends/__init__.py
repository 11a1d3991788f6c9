"""What computes the scores of next tokens: torch, llama.cpp, or a completion server.

A completion server chooses tokens itself, and is an engine of its own.
"""
