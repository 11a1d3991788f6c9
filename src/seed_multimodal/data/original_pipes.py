"""The originals' input pipes that no published data file names, and what reads the same data."""

from __future__ import annotations

import re

# Inputs of pre-tokenization: the tool decides which fields are read, the suffix the file's format.
ENCODED = re.compile(
    r"src\.data\.torchdata_(eval|preprocess|train)\.build_"
    r"(caption|coco_caption|edit|video|mmc4|llava|question_answer)_datapipes"
    r"(_with_pixels|_with_pixel_values)?$"
)
# Part of a name -> what to use; the first entry that matches counts.
_ADVICE = {
    "retrieval_augmented": "write each sample with its contexts as a document, decoder "
    "pretrain.interleaved",
    "m3it": "write its records as JSON lists of image, question and answer, for "
    "extract_image_ids_to_torchdata_parallel_qa.py --fields plain",
    "video_gen": "videos are read (sft.video, pretrain.video), not generated; a first frame is "
    "drawn by sft.qa",
    "caption_eval": "captions are scored by `seed eval caption`, not during training; held-out "
    "data is eval_data",
    "webdata": "name the same tars under the builders of torchdata_train",
    "with_pixels": "pixels are encoded before training: name this file in --data of an "
    "extract_image_ids_… tool",
    "llava": "encode the conversations by extract_image_ids_to_torchdata_parallel_chat.py, "
    "decoder chat",
    "coco_caption": "encode the captions by extract_image_ids_to_torchdata_parallel.py, decoder "
    "pretrain.caption",
    "edit_datapipes": "encode the edits by extract_image_ids_to_torchdata_parallel_edit.py, "
    "decoder sft.edit",
    "video_datapipes": "encode the videos by extract_image_ids_to_torchdata_parallel_video.py, "
    "decoder sft.video",
    "mmc4": "encode the documents by extract_image_ids_to_torchdata_parallel_interleaved.py, "
    "decoder pretrain.interleaved",
    "question_answer": "encode the questions by extract_image_ids_to_torchdata_parallel_qa.py, "
    "decoder sft.qa",
}


def advice(target: str) -> str:
    """What to use in place of an original pipe, as the end of a message ("; here: …"), or ""."""
    if not target.startswith("src.data."):
        return ""
    for part, text in _ADVICE.items():
        if part in target:
            return f"; here: {text}"
    return ""
