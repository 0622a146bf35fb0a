"""The parts of the consultation screen, from the banner down to the composer."""
