"""The expert FFN on a CPU: plain and packed products."""
