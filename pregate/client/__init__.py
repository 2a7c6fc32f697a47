"""The gRPC client; imports neither torch, ray, transformers nor numpy."""
