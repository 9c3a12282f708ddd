"""Cue swap, the small world of the claim: its images, its source network, and what prepares it."""
