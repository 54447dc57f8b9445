"""Text out of a trained model: sampling, search, decoding over any topology."""
