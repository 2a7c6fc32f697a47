"""Timing, block-size tuning and warming up of kernels."""
