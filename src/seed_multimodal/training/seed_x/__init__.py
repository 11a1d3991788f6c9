"""Trainings of SEED-X's parts on the one loop."""
