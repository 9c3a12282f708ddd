"""mmengine hooks of the engine, one idea per module."""
