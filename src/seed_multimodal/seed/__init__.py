"""SEED-1 and SEED-2: tokenizers, de-tokenizers, training stages, checkpoints and export."""
