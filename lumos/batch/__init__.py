"""Many clips from one command: a list of prompts read, shared by processes, gone on with after a stop."""
