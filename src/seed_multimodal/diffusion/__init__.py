"""Shared code of de-tokenizers.

`base`      loading, settings and the denoising loop of a `Detokenizer`
`layout`    layout decoders of the shipped models' small U-Nets
`offload`   parts that are on the device only while they compute
`training`  noised latents, size conditions, trained parameters of U-Nets
"""
