"""The store: named, versioned artifacts, and which version is current."""
