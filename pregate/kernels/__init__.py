"""The expert FFN: plain-torch reference, segments, CPU and Triton implementations, and one entry point."""
