"""LaVIT's training: the published recipe has no public code."""
