"""The screens: the consultation, the help and the question before something is lost."""
