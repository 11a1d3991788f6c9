"""Shared networks.

`vision`       vision encoders, and their registry
`quantizer`    vector quantizer
`layers`       attention, blocks and norms, activation checkpointing
`pretrained`   loading and saving of networks
"""
