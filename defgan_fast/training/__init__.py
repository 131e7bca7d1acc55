"""Training of generators and classifiers, from data to weight files; see docs/training.md."""
