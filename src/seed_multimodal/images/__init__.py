"""Room `images`: opening, limits, transforms, encoding, contact sheets. Imports nothing of the other rooms."""
