"""Text and token ids: documents from files, windows to calibrate on, batches and padding."""
