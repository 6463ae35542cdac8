"""What runs left behind: their records and lm_eval's files, read, checked and listed.

Reads files only; imports neither torch nor lm_eval.
"""
