"""What exists only for the originals' Python objects: names, arguments and results of their classes around ours.

The folders `models/`, `src/models`, `src/processer`, `src/data` and those of the same names in `MultiModalLLM/src` give
these objects the originals' import paths, for programs that start with `pyrootutils.setup_root(…, pythonpath=True)`.
"""
