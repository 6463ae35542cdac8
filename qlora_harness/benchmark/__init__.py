"""Benchmarks of training steps and of scoring, against peers; their records and tables."""
