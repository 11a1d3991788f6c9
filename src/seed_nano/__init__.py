"""Nano: a small world of scenes, the pipelines that train nano, nano-x and nano-lavit on it, and their reports."""
