"""Errors and logging: what every other package stands on."""
