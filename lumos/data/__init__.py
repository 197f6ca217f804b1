"""Where clips and captions come from."""
