"""Trainings of SEED-X."""
