"""Keys of a config that the engine reads: their checks before anything runs."""
