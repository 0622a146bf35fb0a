"""The commands of the trainer room, one module each."""
