"""Video and picture files: reading, writing, frames and sheets."""
