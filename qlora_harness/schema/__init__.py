"""The records of a run as types: what the writers write, and what every reader gets.

`qlora-harness schema KIND` prints the JSON schema of one.
"""
