"""Training data, from files to batches.

formats            files → records
decoders           record → training sequence
stream             order of samples, sources, packed rows, worker processes, batches
check              `seed data check`: decodes records as training does
"""
