"""Nano: synthetic scenes, the pipelines that train nano, nano-x and nano-lavit on them, and their reports."""
