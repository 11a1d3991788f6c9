"""Readers of all record formats, with one record type, and the webdataset tar writer."""
