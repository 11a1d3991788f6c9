"""Pictures of a data set → codes, once: input shards in, webdataset tars of json records out (see `run.py`)."""

RELEASED_GPUS = 4  # the default of --gpus
RELEASED_BATCH = 256  # pictures that the released tools encode at once
