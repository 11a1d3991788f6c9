"""Pre-tokenization: images of a data set → webdataset tars of JSON records with codes (see `run.py`)."""
