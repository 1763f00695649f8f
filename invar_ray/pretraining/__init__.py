"""How a base is made that can read: a pruned vocabulary, a start that can already copy, a curriculum of reading."""
