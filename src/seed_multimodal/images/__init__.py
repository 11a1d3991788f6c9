"""Images: reading with limits (`io`), transforms of vision encoders (`transforms`), the random
transform of training (`augment`), views of any resolution (`views`), contact sheets (`sheet`).
Imports no other subpackage.

What needs torch is imported from its module.
"""

from seed_multimodal.images.io import (
    ImageLimits,
    ImageSource,
    Opened,
    StoredImage,
    image_to_bytes,
    open_image,
)

__all__ = [
    "ImageLimits",
    "ImageSource",
    "Opened",
    "StoredImage",
    "image_to_bytes",
    "open_image",
]
