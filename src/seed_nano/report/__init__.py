"""Reports of the small systems."""
