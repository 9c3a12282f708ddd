"""From a data set to batches: who is drawn, under which seed, in which order, and how they reach the device."""
