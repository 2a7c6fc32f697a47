"""`pregate report`: measure a routed checkpoint and show it as one page."""
