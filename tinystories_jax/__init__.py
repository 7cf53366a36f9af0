"""Trains a small story-writing language model with JAX and Flax: stories, tokenizer, cache, model, loop, sampling."""

__version__ = "0.1.0"
