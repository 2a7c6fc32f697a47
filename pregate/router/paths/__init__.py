"""The path router service: prompts in, packed paths out, in a process of its own between front doors and engine."""
