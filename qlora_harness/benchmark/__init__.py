"""Times training steps and scoring against other tools, and writes records and tables."""
