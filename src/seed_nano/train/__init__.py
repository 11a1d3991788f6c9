"""The nano speed run: every part of the system trained from scratch, one stage after another."""
