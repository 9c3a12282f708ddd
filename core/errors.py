"""Errors whose message is all that a user needs: tools print them without a traceback."""


class VitrineError(Exception):
    """Base of the errors that tools report as one clear message."""


class ConfigError(VitrineError, ValueError):
    """A config, an override or a command line that cannot be meant."""
