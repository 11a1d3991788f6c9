"""The vision encoder of Qwen-VL-Chat, with its attention pool, as the file that SEED-X's YAML files
name.

python src/tools/reload_qwen_vit.py     pretrained/Qwen-VL-Chat → pretrained/QwenViT/qwen_vit_G.pt
python src/tools/reload_qwen_vit.py --source /data/Qwen-VL-Chat --force
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.weight_programs import reload_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(reload_script())
