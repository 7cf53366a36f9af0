"""What is said about a run beside training it: before, what it will cost."""
