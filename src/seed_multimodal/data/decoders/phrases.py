"""Canned sentences of instruction data, most of them in `phrases.yaml`.

A request and its response share an index.
"""

from __future__ import annotations

from seed_multimodal.config import read_table

_TABLES = read_table(__file__)

# Removed from the instructions of the pretraining edit data.
EDIT_PREFIX = "Edit this image with the instruction: "
NO_DIALOGUE = "Image Descriptions"  # a question that contains this has no dialogue
VIDEO_ARTEFACT = "\nQA_GT_caption_based_noisy"  # at the end of some answers of ActivityNet-QA
FIRST_IMAGE = "This is the first image."
SECOND_IMAGE = "This is the second image."
NEXT_IMAGE_REQUEST = "Please generate an image."
NEXT_IMAGE_RESPONSE = "Here is an image."

DRAW_REQUESTS, DRAW_RESPONSES = zip(*_TABLES["draw"], strict=True)
FIRST_DRAW_QUESTION = _TABLES["first_draw_question"]
EDIT_RESPONSES: list[str] = _TABLES["edit_responses"]
N_EDIT_RESPONSES = _TABLES["n_edit_responses"]
STORY_REQUESTS, STORY_RESPONSES = zip(*_TABLES["story"], strict=True)
SEEDX_DRAW_REQUESTS, SEEDX_DRAW_RESPONSES = zip(*_TABLES["seed_x_draw"], strict=True)
SEEDX_DRAW_RECORDED = _TABLES["seed_x_draw_recorded"]
SEEDX_EDIT_RESPONSES: list[str] = _TABLES["seed_x_edit_responses"]
