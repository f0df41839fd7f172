"""`mopro-fast bench`: a training step and its peers (throughput.py), how things are measured (timing.py)."""
