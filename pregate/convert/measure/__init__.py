"""What a model is worth: scoring, agreement of routers, controls beside a checkpoint, overlap of experts."""
