"""Command lines: options, the console, messages, signals, processes."""
