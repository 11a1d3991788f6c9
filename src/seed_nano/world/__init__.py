"""Nano's data: scenes composed of openly licensed drawings, with exact captions, answers, boxes and
edits."""
