"""The router service: paths, plans, exchange, engine and front doors."""
