"""Optimizer, jitted steps, checkpoints, metrics, and the loop that assembles them."""
