"""What a checkpoint holds beside weights: the runner's state, the hooks', random generators, first weights."""
