"""The engine: scheduler, plans, exchange, KV cache, the model of a step, sampling."""
