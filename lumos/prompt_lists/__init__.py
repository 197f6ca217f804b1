"""Lists of clips: read, shared by processes, resumed after a stop."""
