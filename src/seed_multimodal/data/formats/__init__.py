"""Records on disk, read into one type whatever the format, and written as webdataset tars."""
