"""Training of conditional denoisers: `task.PixelTask`, the base of the families' tasks."""
