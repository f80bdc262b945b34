"""Training a draft for a model that stays as it is: its loss, and texts by the model itself."""
