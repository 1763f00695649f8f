"""What runs in the replicas: the retriever, the generators, and how the service reaches them."""
