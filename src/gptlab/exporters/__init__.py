"""Exports to other formats, each checked by the format's own reader."""
