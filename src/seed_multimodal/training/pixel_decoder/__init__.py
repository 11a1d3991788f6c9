"""Training of conditional denoisers: `task.PixelTask`, the base of SEED-X's and LaVIT's."""
