"""Systems: what a folder holds, and the class that describes, answers, draws and edits.

config     `SystemConfig`: keys of `system.json`, and where the parts are
images     the families, devices of the parts, and `ImageCodec`: image encoder and decoder
answers    `ConversationGenerator`: conversations as prompts, and their answers in batches
base       `MultimodalSystem`
assemble   writing of a system's folder
"""
