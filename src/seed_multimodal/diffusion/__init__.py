"""Shared code of de-tokenizers.

`base`         loading, settings and the denoising loop of a `Detokenizer`
`conditioner`  networks of other packages that start sampling and condition the U-Net
`offload`      parts that are on the device only while they compute
`training`     noised latents, size conditions, trained parameters of U-Nets
"""
