"""Training of the language model: model, data, loss, metrics and command line."""
