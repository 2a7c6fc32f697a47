"""Expert hosts: processes that own units, and what an engine holds of them."""
