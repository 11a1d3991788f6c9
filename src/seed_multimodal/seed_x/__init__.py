"""SEED-X: images as continuous features for a language model, drawn again by SDXL."""
