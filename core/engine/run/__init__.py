"""One run from its folder to its result: begin, go on, stages, sweeps, run again."""
