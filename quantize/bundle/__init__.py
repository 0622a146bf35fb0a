"""Everything a computer without a network needs, in one folder: wheels, model, installer, checksums."""
