"""The loop that trains a student, and what it needs around it: setup, checkpoints, the run folder, guards, trackers."""
