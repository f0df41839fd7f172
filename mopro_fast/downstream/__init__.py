"""What people train MoPro for: cleaned labels, retrained classifiers, features, evaluations, weights in and out."""
