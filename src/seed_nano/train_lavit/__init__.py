"""nano-lavit: a tiny LaVIT, trained on nano's scenes on top of a finished nano."""
