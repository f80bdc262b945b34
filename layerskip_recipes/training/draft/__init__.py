"""Training a draft: its loss, and text that the model writes for it."""
