"""`layerskip_eval` measures every exit on a dataset. May import training and the packages below it."""
