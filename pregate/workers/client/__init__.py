"""What an engine holds of a host: in its own process or over the channel."""
