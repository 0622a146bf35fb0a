"""Deterministic builders that turn the cards into PedCorpus records."""
