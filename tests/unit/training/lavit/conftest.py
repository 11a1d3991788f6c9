"""Tokenizers, language model and data of LaVIT."""

import pretrain_parts
from llm_runs import fixtures_of

parts_dir, config_of = fixtures_of(pretrain_parts)
