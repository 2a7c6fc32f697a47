"""The expert FFN: plain-torch reference, CPU path and one entry point."""
