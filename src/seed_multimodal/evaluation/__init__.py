"""Evaluation of systems on benchmarks, and of image tokenizers.

benchmark         what a benchmark is, and `run`: a system on one of them, resumable, shared by
                  processes; `BENCHMARKS`, a row for each
annotations       lists of questions and captions, of any format → samples
vqa, captions, choices    benchmarks whose answers are texts
text2image        drawings of captions, compared by CLIP (`clip`) and FID (`fid`)
judged            drawings that another model judges: geneval (`detection`), tifa (`judges`)
study             rows of settings × seeds × measures, in processes; `seed study`
suite             the papers' tables, of several benchmarks
tokenizer         a tokenizer's report: retrieval, reconstruction, codebook
metrics, retrieval    the figures themselves
verify            what a model computes of fixed inputs, compared with a reference
machine           measurement conditions for reports
lmms              systems as a model of lmms-eval
"""
