"""SEED-X: images as continuous features for a language model, decoded by SDXL."""
