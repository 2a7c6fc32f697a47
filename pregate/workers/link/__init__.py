"""What engine and host say to each other: messages, their bytes, sockets."""
