"""From a tuned network to edited clips: inversion, windows, edits, the page of results, submissions."""
