"""Recipes of SEED-X.

data         conversations, image generation and edits as training sequences
losses       `TrainedAgent`, losses of the de-tokenizer
train_*      trainer tasks: the agent, the de-tokenizer
"""
