"""`seed data check`: training data read and decoded once before a training does."""
