"""From image files to batches: which images there are (index), the two views (augment), the loaders (pipeline)."""
