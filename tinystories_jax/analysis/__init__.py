"""What a run's files tell: reports and comparisons. Nothing here initialises a device."""
