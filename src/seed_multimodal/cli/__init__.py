"""The commands of `seed`; parsing and printing, no model code."""
