"""Search: index, retriever, mined negatives, and answers from what was retrieved."""
