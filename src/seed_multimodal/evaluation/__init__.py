"""Evaluation of systems on benchmarks, and of image tokenizers.

tasks             the benchmarks, and `evaluate`: a system on one of them
annotations       their files → samples; answers: samples → answer files, resumable
vqa, captions, drawing    a system's answers and scores by kind of benchmark
tokenizer         a tokenizer's report: retrieval, reconstruction, codebook
retrieval, caption_scores, metrics    the figures themselves
openai_clip       OpenAI's CLIP in one file
machine           measurement conditions for reports
lmms              systems as a model of lmms-eval
"""
