"""The command line: composition of everything a user can ask for."""
