"""The language model's training application: model, optimiser, engines, checkpoints, and the loop over packed data."""
