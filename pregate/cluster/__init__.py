"""Composition: placement, supervisor, launch, Serve application, command line."""
