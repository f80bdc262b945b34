"""The `layerskip` command and the entry points for `tune run`."""
