"""Prompts: an entry becomes messages, messages become token ids, and rows of ids lie ready on disk."""
