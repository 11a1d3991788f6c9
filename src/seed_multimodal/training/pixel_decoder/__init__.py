"""Training of U-Nets that draw images from conditions; SEED-X and LaVIT bring their conditions."""
