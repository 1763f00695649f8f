"""One file into one text: a module per kind of file, each the only one that imports its library."""
