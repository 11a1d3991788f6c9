"""Where weights are: the originals' repositories (`catalogue`), paths on this disk (`find`), and
downloads (`fetch`)."""
