"""Training, evaluation, and the first batches of an evaluation tried out beforehand."""
