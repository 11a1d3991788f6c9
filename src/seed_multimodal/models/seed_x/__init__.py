"""SEED-X: a language model that reads and outputs continuous image features, drawn by SDXL.

views        grids of views of images of any resolution
modeling     `ContinuousLVLM` ("agent"): LLaMA with an input and an output resampler
processing   `SeedXPrompts`: prompts with images and boxes; boxes of answers
pipeline     `SeedXFamily` and its `SeedXImageCodec`
adapter      `SDXLAdapter`: SDXL's U-Net, and the resampler of its prompt
diffusion    `SdxlDetokenizer`: features → images
spec         the family's `FamilySpec`; `SeedXConfig`
"""
