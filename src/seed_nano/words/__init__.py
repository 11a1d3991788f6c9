"""Words of a system's training data: how users' are read, and what contradicts a request."""
