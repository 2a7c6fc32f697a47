"""A load test: arrivals in, requests at a target, and what they came to."""
