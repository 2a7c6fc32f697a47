"""Checkpoints for others: a stock Qwen2-MoE folder, or the dense parent again."""
