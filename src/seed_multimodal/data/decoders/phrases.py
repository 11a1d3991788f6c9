"""Canned sentences of the original instruction data where they are public, and our own elsewhere.

A request and its response share an index; public ones keep their original index.
"""

from __future__ import annotations

# Removed from the instructions of the pretraining edit data.
EDIT_PREFIX = "Edit this image with the instruction: "
NO_DIALOGUE = "Image Descriptions"  # a question that contains this has no dialogue
VIDEO_ARTEFACT = "\nQA_GT_caption_based_noisy"  # at the end of some answers of ActivityNet-QA
FIRST_IMAGE = "This is the first image."
SECOND_IMAGE = "This is the second image."
NEXT_IMAGE_REQUEST = "Please generate an image."
NEXT_IMAGE_RESPONSE = "Here is an image."

# Requests to generate an image, and the responses; from FIRST_DRAW_QUESTION on they end in a
# question mark. From recordings of the original: 0 to 4 (1 and 3 without their index), 6, 8, 9, 12,
# 15, 16.
DRAW_REQUESTS = (
    "Please show me a picture of",
    "Please generate an image of",
    "Please produce a photo of",
    "Generate an image of",
    "Please draw a painting of",
    "Please make a drawing of",
    "I'd love to see an illustration of",
    "I need an image of",
    "I want to see a picture of",
    "I would like to see a photo of",
    "Make a photo of",
    "Draw a picture of",
    "Show me a photograph of",
    "Please create a picture of",
    "Could you make an image of",
    "Can you draw a painting of",
    "Can you produce a picture of",
    "Could you show me a photo of",
    "Could you draw a picture of",
    "Could you make an illustration of",
)
FIRST_DRAW_QUESTION = 14
DRAW_RESPONSES = (
    "Here is a picture.",
    "I have generated an image.",
    "Here is a photo.",
    "I have generated an image.",
    "Here's a painting.",
    "Here is the drawing.",
    "Enjoy this illustration.",
    "Here is the image.",
    "Here is a picture.",
    "I have created a photo.",
    "Here is the photo.",
    "Here is the picture.",
    "Here is a photograph.",
    "I have made a picture.",
    "Yes, here is the image.",
    "Absolutely, here is a painting.",
    "Sure, here is a picture.",
    "Yes, here is the photo.",
    "Yes, here is the picture.",
    "Yes, here is the illustration.",
)

# Responses to an editing instruction; the original decoders use only the first N_EDIT_RESPONSES of
# them. From recordings of the original: 0 to 4.
EDIT_RESPONSES = (
    "Here is a picture.",
    "I have created an image.",
    "Enjoy this picture.",
    "I have generated an image.",
    "Here's a picture.",
    "Here is the edited picture.",
    "Here is the changed image.",
    "Here is the new picture.",
)
N_EDIT_RESPONSES = 6

# From recordings of the original: the pairs 1 and 5.
STORY_REQUESTS = (
    "Please go on with the story in pictures and texts.",
    "Would you utilize pictures and texts to show me the following story?",
    "How does the story go on? Please use pictures and texts.",
    "Please show me in pictures and words how this continues.",
    "Continue this story with pictures and short texts.",
    "Please use images and text to inform me what will happen next.",
    "What happens afterwards? Please answer with pictures and texts.",
    "Please draw and write the rest of the story.",
    "I would like to know how this ends, in pictures and words.",
    "Please write and illustrate what comes next.",
)
STORY_RESPONSES = (
    "The story goes on like this, in pictures and texts.",
    "I would be happy to utilize pictures and texts to show you the following story.",
    "This is how the story goes on.",
    "These pictures and words show how it continues.",
    "The story continues with these pictures and texts.",
    "Here are images and text to inform you what will happen next.",
    "This happens afterwards, in pictures and texts.",
    "I have drawn and written the rest of the story.",
    "This is how it ends, in pictures and words.",
    "I have written and illustrated what comes next.",
)

# SEED-X's requests to generate an image (the caption follows) and the responses. Those with indices
# in SEEDX_DRAW_RECORDED are from recordings of the original, the others are ours.
SEEDX_DRAW_RECORDED = (7, 9, 14, 15, 18)
_SEEDX_DRAW = (
    ("Please show me a picture of", "Here is a picture."),
    ("Please generate an image of", "Here is an image."),
    ("Please produce a photo of", "Here is a photo."),
    ("Please draw a painting of", "Here is a painting."),
    ("Please make a drawing of", "Here is the drawing."),
    ("I'd love to see an illustration of", "Enjoy this picture."),
    ("I need an image of", "Here is the image."),
    ("I'd like to view an image of", "Take a look at this image."),
    ("I want to see a picture of", "I have generated a picture."),
    ("I would like to see a photo of", "I have created a photo."),
    ("Make a photo of", "Here's the photo."),
    ("Draw a picture of", "Here's the picture."),
    ("Show me a photograph of", "Here is a photograph."),
    ("Please create a picture of", "I have made a picture."),
    ("Generate an image:", "Here's an image."),
    ("Generate a picture:", "Here's a picture."),
    ("Draw a painting:", "Here's a painting."),
    ("Produce a photo:", "Here's a photo."),
    ("Show me a photograph:", "Here's a photograph."),
    ("Make an illustration:", "Here's an illustration."),
    ("Could you make an image of", "Sure, here is an image."),
    ("Can you draw a painting of", "Sure, here is a painting."),
    ("Can you produce a picture of", "Sure, here is a picture."),
    ("Could you show me a photo of", "Of course, here is a photo."),
    ("Could you draw a picture of", "Of course, here is a picture."),
    ("Could you make an illustration of", "Sure, please enjoy this illustration."),
    ("Can you create an image of", "Of course, here is an image."),
    ("Can you show me a photograph of", "Yes, here is the photograph."),
)
SEEDX_DRAW_REQUESTS, SEEDX_DRAW_RESPONSES = zip(*_SEEDX_DRAW, strict=True)

# SEED-X's responses to an editing instruction; the last one is empty. From recordings, without
# their index: the first eight.
SEEDX_EDIT_RESPONSES = (
    "Here's a painting.",
    "I have created a photo.",
    "Here is a photograph.",
    "Enjoy this illustration.",
    "Of course, here is a photo.",
    "Here is a picture.",
    "Here is a photo.",
    "Sure, please enjoy this illustration.",
    "Here is an image.",
    "Here's a picture.",
    "Here's an image.",
    "Enjoy this picture.",
    "Take a look at this image.",
    "I have generated an image.",
    "I have created an image.",
    "I have made a picture.",
    "Sure, here is a picture.",
    "Of course, here is an image.",
    "Yes, here is the picture.",
    "Here is the edited picture.",
    "",
)
