"""Decoupling: a path router's targets, losses and training."""
