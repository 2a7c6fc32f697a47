"""Errors, logging, metric definitions: what every other package stands on."""
