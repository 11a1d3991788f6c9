"""Pre-tokenization: images of a data set → webdataset tars of JSON records with codes.

`run`           writes the shards
`inputs`        settings of the input, and its shards
`dataset`       records → resized images, in worker processes
`record_types`  what is read of a record, and the output record
`encode`        images → codes
`frames`        frames of videos, augmented views
"""
