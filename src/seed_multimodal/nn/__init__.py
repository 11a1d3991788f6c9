"""Networks that several models share: EVA ViT, vector quantizer, layers, loading and saving."""
