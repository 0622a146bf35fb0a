"""Measuring a model through the same door as its users: `pediatricsgpt ask --batch`."""
