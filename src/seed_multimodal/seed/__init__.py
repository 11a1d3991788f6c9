"""SEED-1 and SEED-2: tokenizers, their training stages, checkpoints and export."""
