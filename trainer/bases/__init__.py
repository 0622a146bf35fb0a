"""Published base models that must be converted before they can be trained here."""
