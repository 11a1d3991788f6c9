"""LaVIT's training tasks; the published recipe has no public code.

tokenizer_task  `LavitTokenizerTask`: stage 1, the dynamic tokenizer
pretrain        `PretrainTask`: stage 2, unified pre-training of the language model
rows            `fill_rows`: rows with images of variable length, for stage 2
detokenizer     `LavitPixelTask`: the pixel decoders
"""
