"""Models: where they come from, the adapters on them, and texts in, vectors or answers out."""
