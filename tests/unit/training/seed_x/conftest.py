"""Tokenizer, vision encoder, language model and data of SEED-X."""

import tuning_parts
from llm_runs import fixtures_of

parts_dir, config_of = fixtures_of(tuning_parts)
