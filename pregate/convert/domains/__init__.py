"""Read-ME: one expert per domain, one index for all layers."""
