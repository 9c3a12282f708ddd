"""Small worlds that need no download: glyphs, scenes of glyphs, moving glyphs."""
