"""LaVIT's training on the one loop: its published recipe was never released as code."""
