"""Compression: makes a generator smaller and faster, and says what that cost."""
