"""Nano's world: scenes composed of openly licensed drawings, with exact words, answers, boxes and edits."""
