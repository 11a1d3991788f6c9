"""Serving: request schema, model back end, HTTP server and web page."""
