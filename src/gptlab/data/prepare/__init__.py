"""From a corpus to token shards: splitting, tokenization by workers, the cache."""
