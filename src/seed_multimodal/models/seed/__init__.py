"""SEED-1 and SEED-2 image tokenizers, and SEED-LLaMA, the language model on their codes.

configuration   sizes of the tokenizers and of the Q-Former
modeling        `Seed1Tokenizer`, `Seed2Tokenizer`: images → codes → embeddings
qformer         the causal Q-Former
checkpoints     loading of our and of the original files
single_file     Stable Diffusion 1 in the original's single file
diffusion       de-tokenizers: Stable Diffusion (SEED-1), unCLIP (SEED-2), `CodesDetokenizer`
code_adapter    decoded codes → tokens of a denoiser
pipeline        `SeedLlamaFamily` and its `SeedImageCodec`
captions        caption tokenizers of stage 1
spec            the family's `FamilySpec`; `SeedLlamaConfig`
"""
