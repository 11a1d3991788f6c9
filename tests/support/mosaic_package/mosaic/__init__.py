"""A model family of another package: images are 8 x 4 tiles of 16 colours, a code each.

spec      parts, settings, training, evaluation and page of the family
pipeline  images ⇄ codes, and the system
train     its language model's training
"""
