"""Training data, from files to batches.

formats            files → records
pretokenize        images of records → codes, in webdataset tars
decoders           record → training sequence
stream             sample order, mixture of sources, packed rows, loader
check              `seed data check`: decodes records as training does
"""
