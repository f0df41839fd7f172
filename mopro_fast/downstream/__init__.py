"""What people train MoPro for: weights in and out, cleaned labels, retrained classifiers, features, evaluations."""
