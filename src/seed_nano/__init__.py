"""Nano: synthetic scenes, the pipelines that train small systems on them, and their reports.

layout: the layout decoders of their U-Nets.
world: scenes, captions, tasks and training records.
train: the pipelines of nano, nano-x and nano-lavit.
report: evaluation of these systems on held-out scenes.
"""
