"""Training of what draws pictures from conditions, whatever the conditions are: SEED-X's and LaVIT's bring theirs."""
