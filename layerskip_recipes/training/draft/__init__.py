"""Training a draft for a frozen model: its loss, and text that the model writes for it."""
