"""Shards: Parquet files of encoded clips, on this machine or in object storage."""
