"""Folders on disk: the dense parent and its shards, the routed checkpoint on its way out, work folders."""
