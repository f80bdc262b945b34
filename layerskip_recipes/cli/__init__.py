"""The commands: `layerskip`, and what `tune run` starts. Imports every other room."""
