"""Shared networks.

`eva`         EVA ViT-g, the vision encoder of SEED and LaVIT
`quantizer`   vector quantizer
`layers`      attention, blocks and norms, activation checkpointing
`pretrained`  loading and saving of networks
"""
