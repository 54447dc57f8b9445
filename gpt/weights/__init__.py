"""Weights from elsewhere and to elsewhere: other projects' files, names and layouts. No torch here."""
