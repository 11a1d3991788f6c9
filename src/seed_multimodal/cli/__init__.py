"""The commands of `seed` and of the scripts with the original names; parsing and printing, no model
code."""
