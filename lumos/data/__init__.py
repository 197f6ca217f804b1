"""Sources of clips and captions: synthetic scenes and ingested shards."""
