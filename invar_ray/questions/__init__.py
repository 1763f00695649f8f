"""How questions come in and are rewritten."""
