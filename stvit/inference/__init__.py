"""Images of what semantic tokens attend to."""
