"""Readers of all record formats, with one record type, and the webdataset tar writer.

    records = open_records("shards/*.tar")     # or .jsonl, .json, .parquet, folders, URLs
    records.read(12).fields

record             `Record`, and the protocol `RecordFile` of readers
sources            `open_records`: files, patterns and folders → `FileRecords`
pairs              `open_pairs`: image-caption pairs
tar, jsonl, parquet, images    a reader for each format; `shards` writes tars
conversations      fields of a conversation → `messages`
images             fields of an image and its caption → content, path, texts
index, storage, open_files    stored indexes, remote files, open files
"""
