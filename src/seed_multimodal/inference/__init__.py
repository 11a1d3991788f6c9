"""Generation by a language model: requests, the scheduler, the KV cache, and what computes tokens."""
