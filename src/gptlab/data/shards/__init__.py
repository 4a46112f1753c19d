"""Token shards: the manifest that describes them, streams over local and remote files, and other programs' formats.

Shards are verified by their SHA-256, and one process at a time writes them.
"""
