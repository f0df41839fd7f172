"""A run's state on disk (state.py, its fields: fields.py), weights from any file (weights.py), the formats of others
(formats.py, foreign.py)."""
