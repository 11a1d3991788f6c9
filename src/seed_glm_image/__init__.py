"""GLM-Image as a model family: semantic codes → language model → diffusion transformer.

It is a package of its own, found by an entry point as any other package's family is (see
`docs/how-to/add-a-family.md`). The networks are those of transformers and diffusers; here are their
prompts, their training, and what joins them.

spec         parts, settings, trainings
processing   grids of codes, positions with axes, prompts, text tokenizer
modeling     language model alone, image tokenizer
diffusion    de-tokenizer
pipeline     images ⇄ codes, and the system
data         records → training sequences
train        trainings of the language model and of the de-tokenizer
"""
