"""Looks at a run from outside: checks before it, plans, reports and comparisons after it."""
