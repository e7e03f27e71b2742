"""Training: the loops, the only backward pass, and the state that a checkpoint holds."""
