"""The one async API behind every front door, and the doors."""
