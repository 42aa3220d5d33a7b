"""Checkpoints of other authors: their folders, key maps and JSON files, read and written."""
