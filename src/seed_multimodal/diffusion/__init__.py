"""What the de-tokenizers of all model families share: loading, the denoising loop, layouts, training losses."""
