"""Training of conditional U-Nets: `task.PixelTask`, the base of SEED-X's and LaVIT's."""
