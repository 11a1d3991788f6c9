"""What several kinds of SEED-X fixtures share: their tokenizer with the fixture's number of words a picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from runner import DEFAULT_DIR

from seed_multimodal.language.tokenizer import MultimodalTokenizer


def seedx_tokenizer(folder: Path, tokens_per_image: int, place: Path) -> MultimodalTokenizer:
    """The tokenizer folder of a fixture, copied to `place` and told how many words a picture takes."""
    source = folder / "tokenizer"
    shutil.copytree(source if source.is_dir() else DEFAULT_DIR / "seedx_sequences" / "tokenizer", place,
                    copy_function=shutil.copyfile)
    place.chmod(0o755)
    file = place / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), "tokens_per_image": tokens_per_image}
    file.write_text(json.dumps(config))
    return MultimodalTokenizer.from_pretrained(place)
