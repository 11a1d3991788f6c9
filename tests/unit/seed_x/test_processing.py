"""SEED-X's tokens and boxes (prompts: `unit/data/decoders/test_families.py`; malformed boxes:
`unit/serving/test_systems.py`).
"""

from seed_multimodal.language.vocabulary import SeedXVocabulary
from seed_multimodal.models.seed_x.processing import Box, box_parts


def test_vocabulary_has_the_original_ids():
    # Ids are those of the published embeddings: one off, and all boxes are wrong.
    vocabulary = SeedXVocabulary()
    assert vocabulary.size == 32330
    tokens = "<img_00000> <img_00099> <img> </img> <patch> </patch> <loc-0> <loc-223>".split()
    ids = [vocabulary.added_tokens[token] for token in tokens]
    assert ids == [32000, 32099, 32100, 32101, 32102, 32103, 32104, 32327]

    # The car of the authors' own image.
    box = "<box_start><loc-114><loc-174><loc-115><loc-56><box_end>"
    assert box_parts(box, vocabulary) == [(32328, 32218, 32278, 32219, 32160, 32329)]
    assert Box(114, 174, 115, 56).corners((1200, 1200)) == (302, 782, 918, 1082)


def test_box_from_corners_and_back():
    # In units of 224 from centre and size to pixels.
    assert Box.from_corners((302, 782, 918, 1082), (1200, 1200)) == Box(114, 174, 115, 56)
    assert Box.from_corners((0, 0, 640, 480), (640, 480)) == Box(112, 112, 223, 223)
    assert Box(0, 223, 100, 100).corners((224, 224)) == (0, 173, 50, 224)  # clipped at the edges
