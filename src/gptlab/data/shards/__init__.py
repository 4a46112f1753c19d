"""Token shards: manifests, streams over local and remote files, other programs' formats."""
