"""A question to its answer: search, fusion, filters, generation."""
