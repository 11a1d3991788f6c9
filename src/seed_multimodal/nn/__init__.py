"""Shared networks: EVA ViT, vector quantizer, layers, loading and saving."""
