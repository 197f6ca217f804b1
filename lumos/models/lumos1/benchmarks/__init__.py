"""Speed and memory of the parts of Lumos-1."""
