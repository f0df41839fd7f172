"""A run's state on disk (state.py), weights from any file (weights.py), the formats of others (formats.py)."""
