"""Text: reading, cutting, rewording, prompts and answer strings; no tensors, no cluster."""
