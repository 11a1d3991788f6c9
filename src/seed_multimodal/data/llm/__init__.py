"""Room `data.llm`: records of text and pictures -> token sequences -> packed or padded batches for the LLM."""
