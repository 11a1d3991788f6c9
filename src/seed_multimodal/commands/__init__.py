"""What the console command `seed` and the scripts with the original names do; parsing and printing, no model code."""
