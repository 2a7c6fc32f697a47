"""The expert FFN in Triton: kernels, their path and their block sizes."""
