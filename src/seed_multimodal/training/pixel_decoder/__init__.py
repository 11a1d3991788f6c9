"""Training of conditional U-Nets, shared by SEED-X and LaVIT."""
