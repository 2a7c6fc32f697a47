"""An expert host: its units, its threads, its actor."""
