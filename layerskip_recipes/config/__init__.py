"""From a config's name to a checked config. Imports errors only."""
