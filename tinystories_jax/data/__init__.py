"""From stories to batches of token IDs; never imports JAX."""
