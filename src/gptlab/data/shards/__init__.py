"""Token shards: manifest, streams over local and remote files, and the formats of other programs.

Shards are verified by their SHA-256 and written by one process at a time.
"""
