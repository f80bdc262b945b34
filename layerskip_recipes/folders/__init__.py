"""Folders with models: paths, names on the hub, the checkpoints of a run. Imports config and the packages below it."""
