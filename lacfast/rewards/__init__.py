"""Rewards: the registry that finds them by name, the queue that scores aside, and a file for each reward."""
