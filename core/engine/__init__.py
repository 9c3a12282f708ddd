"""Running an experiment: launch, runner, loops, hooks, and the commands that build on them."""
