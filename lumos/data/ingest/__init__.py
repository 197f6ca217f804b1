"""Videos and pictures with captions in, shards of codes out."""
