"""Rows to conversations to token ids and labels. Nothing here knows a model or a trainer."""
