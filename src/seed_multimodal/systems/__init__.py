"""Room `systems`: what a user holds: `SeedLlama` sees, answers, draws, edits and talks. Imports all model rooms."""
