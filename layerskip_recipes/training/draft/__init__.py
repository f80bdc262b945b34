"""Training a draft: its section and its loss."""
