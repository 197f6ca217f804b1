"""From a request to frames: what the pipelines of all generators share."""
