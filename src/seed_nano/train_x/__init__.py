"""Training of nano-x, the tiny SEED-X."""
