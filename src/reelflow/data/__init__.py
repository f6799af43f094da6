"""Where clips to learn from come from: folders, shards, and the endless rendered world of `toybox`."""
