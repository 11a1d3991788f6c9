"""Shared networks.

`vision_encoder`   what models need of a vision encoder
`eva`              EVA ViT-g, the vision encoder of SEED and LaVIT
`quantizer`        vector quantizer
`layers`           attention, blocks and norms, activation checkpointing
`pretrained`       loading and saving of networks
"""
