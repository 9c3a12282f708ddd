"""Reading weights that others wrote, pickles among them, without executing anything."""
