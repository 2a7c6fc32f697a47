"""On a CPU: the expert FFN, in plain and packed products, and a step's kernels."""
