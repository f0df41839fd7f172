"""The trainer (loop.py), a run's folder (run.py), what differs between methods (task.py, tasks.py), the step."""
