"""Ingest: videos and pictures with captions are encoded into shards of codes."""
