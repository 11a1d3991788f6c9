"""Training of the nano systems from scratch, as a pipeline of stages."""
