"""Room `serving`: request schema, engine, Flask backend and Gradio page. Imports `systems`; nothing imports it."""
