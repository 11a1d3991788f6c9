"""Sample order, mixture of sources, packed and padded rows, loader and statistics."""
