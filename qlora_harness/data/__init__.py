"""Turns rows into conversations and token ids, without knowing models or trainers."""
