"""Recipes of LaVIT.

losses       `LavitStage1`, `UnifiedLoss`
codes        codes for pre-tokenization
data         captions, questions and compositions as training sequences
train_*      trainer tasks: tokenizer, language model, pixel decoders
evaluate     questions and answers as published
export       a stage-1 checkpoint → folders for the system
"""
