"""LaVIT: images as a variable number of tokens for a language model.

    modeling     `DynamicTokenizer`: token selector, token merger, quantizer
    decoder      `CodeDecoder`: codes → conditions of a U-Net
    diffusion    `LavitDetokenizer`: conditions → images
    ratios       `RATIOS`: aspect ratios of drawings
    processing   `LavitTokenizer`, prompts, ends of answers
    pipeline     `Lavit`: the system
    checkpoints  folders of the tokenizer, the original's and ours
    training     `LavitStage1`, `TrainedPixels`: losses
    export       a stage-1 checkpoint → folders for the system
    original     the original's `build_model` and its classes

Nothing is imported here: `ratios` is used without torch.
"""
