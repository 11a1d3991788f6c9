"""LaVIT: images as a variable number of tokens for a language model.

    modeling     `DynamicTokenizer`: token selector, token merger, quantizer
    decoder      `CodeDecoder`: codes → conditions of a U-Net
    diffusion    `LavitDetokenizer`: conditions → images
    ratios       `RATIOS`: aspect ratios of drawings
    processing   `LavitTokenizer`, prompts, ends of answers
    pipeline     `LavitFamily` and its `LavitImageCodec`
    checkpoints  folders of the tokenizer, the original's and ours
    spec         the family's `FamilySpec`; `LavitConfig`

Nothing is imported here: `ratios` is used without torch.
"""
