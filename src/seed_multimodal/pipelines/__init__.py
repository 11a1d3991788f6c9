"""Systems: what a folder holds, and the class that describes, answers, draws and edits.

config     `SystemConfig`: keys of `system.json`, and where the parts are
images     devices of the parts, and `ImageCodec`: image encoder and decoder
family     `Family`: the loaded parts, and what differs between families
answers    `AnswerGenerator`: conversations as prompts, and their answers in batches
read_back  a system's description of its drawings, and notes
base       `MultimodalSystem`, for every family
assemble   writing of a system's folder
"""
