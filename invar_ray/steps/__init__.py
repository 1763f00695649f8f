"""One file per artifact kind: its VERSION, its plan, how it is built."""
