"""invar_ray: invariant retrieval-augmented generation, trained, indexed and served on Ray."""

__version__ = "0.1.0"
