"""Recovery by training under a checkpoint's own routing."""
