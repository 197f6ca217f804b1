"""How good is what was made."""
