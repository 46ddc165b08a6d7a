"""`plan`: the real train step compiled for hardware that is not there, and what follows from it."""
