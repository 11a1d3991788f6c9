"""Recipes of SEED-1, SEED-2 and SEED-LLaMA.

losses              networks and losses of both stages of the tokenizer
export              stage checkpoints → a tokenizer folder
train_detokenizer   a decoder from images alone, as a trainer task
evaluate            questions and scores as in the original scripts
evaluate_tokenizer  a tokenizer's reconstructions and retrieval
"""
