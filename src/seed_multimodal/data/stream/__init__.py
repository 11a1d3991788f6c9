"""Package `data.stream`: order of samples, mixture of sources, packed and padded rows, the loader, statistics."""
