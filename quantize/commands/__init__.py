"""The commands of the shipping room, one module each."""
