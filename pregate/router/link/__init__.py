"""What front doors and engines say to each other, and the threads that carry it."""
