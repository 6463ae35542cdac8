"""Base models (held in 4 bits or bf16) and adapters. Used by training and by scoring alike."""
