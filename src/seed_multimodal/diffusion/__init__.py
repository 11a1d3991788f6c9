"""Shared code of de-tokenizers.

`base`         loading, settings and the denoising loop of a `Detokenizer`
`conditioner`  networks that start sampling and condition the U-Net, also of other packages
`offload`      parts that are on the device only while they compute
`networks`     denoisers and autoencoders of diffusers
`objectives`   epsilon, velocity and flow: noised latents of training and their targets
`training`     size conditions, trained parameters of denoisers
"""
