"""SEED-X's training tasks.

detokenizer  `DetokenizerTask`: both stages of the SDXL adapter
tuning       `TuningTask`: instruction tuning of the agent
"""
