"""The trainer room: corpus, the four training stages, evaluation."""
