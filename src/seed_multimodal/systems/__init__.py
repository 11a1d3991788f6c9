"""Room `systems`: complete systems behind one object, such as `SeedLlama`. Imports all model rooms."""
