"""Shared code of de-tokenizers: loading, denoising loop, layouts, training losses."""
