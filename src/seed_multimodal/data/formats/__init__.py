"""Readers of all record formats, with one record type, and the webdataset tar writer.

    records = open_records("shards/*.tar")     # or .jsonl, .json, .parquet, folders, URLs
    records.read(12).fields

record             `Record`, `BadRecords`, and the protocol `RecordFile` of readers
records            `open_records`: files, patterns and folders → `FileRecords`
pairs              `open_pairs`: image-caption pairs
tar, jsonl, parquet, images    a reader for each format; `shards` writes tars
conversations      fields of a conversation → `messages`
images             fields of an image and its caption → content, path, texts
index, manifest    stored offsets of a file's records; counts of a folder's files
storage            data files on disk and behind URLs
"""
