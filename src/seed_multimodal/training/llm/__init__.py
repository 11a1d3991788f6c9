"""Training of the language model: command line, settings, model, LoRA, loss, metrics, samples."""
