"""Small worlds that need no download: drawn scenes, scenes of digits."""
