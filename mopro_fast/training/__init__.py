"""The trainer: loop, schedule, checkpoints, log, and what ranks need of each other."""
