"""Systems: what a folder holds, and the class that describes, answers, draws and edits.

config     `SystemConfig`: keys of `system.json`, and where the parts are
images     devices of the parts, and `ImageCodec`: image encoder and decoder
family     `Family`: the loaded parts, and what differs between families
tasks      `Task`: a request with its settings and its notes
run        tasks as events: prompts, answers, images
read_back  what a system's description of its drawing contradicts
base       `MultimodalSystem`, for every family
assemble   writing of a system's folder
"""
