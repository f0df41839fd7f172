"""The names of what can be said of a label."""

NO_LABEL = -1  # allowed in training data
REMOVED = -1  # in a record of decisions: kept out of the losses
UNSEEN = -2  # in a record of decisions: not shown in this epoch
DECISIONS = ("kept", "relabelled", "removed", "unreadable")  # what label correction says of an image
