"""How many tokens the model accepts from an exit or a trained draft: measured in training, stored in layerskip.json."""
