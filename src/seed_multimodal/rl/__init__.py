"""Training of a language model by rewards for its drawings.

config   settings
rewards  functions that score drawings
task     GRPO: groups of answers, their rewards, one step
"""
