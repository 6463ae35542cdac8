"""Base models and adapters, for training and for scoring."""
