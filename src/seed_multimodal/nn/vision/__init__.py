"""Vision encoders: pixels → features of an image's tokens.

`base`       `VisionEncoder` and `VisionConfig`, what models need of one
`registry`   building and loading by type
`eva`        EVA ViT-g, of SEED and LaVIT
`qwen`       Qwen-VL's ViT and `Resampler`, of SEED-X
`hub`        any vision model of transformers
`clip`       transformers' CLIP, also in EVA's network
"""
