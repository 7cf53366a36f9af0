"""Scores of a model and of the stories it writes."""
