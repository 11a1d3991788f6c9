"""Images: reading with limits, transforms, encoding, contact sheets. Imports no other subpackage."""
