"""Rewards by name: what images are judged by, from a file's size to a learned preference; one file each."""
