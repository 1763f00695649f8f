"""Text: reading, cutting, rewrite, prompts and answer strings; no tensors, no cluster."""
