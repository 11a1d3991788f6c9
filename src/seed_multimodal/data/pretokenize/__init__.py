"""Images of a data set → codes, once: input shards in, webdataset tars of json records out (see `run.py`)."""
