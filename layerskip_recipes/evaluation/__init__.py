"""`layerskip_eval` measures every exit, and runs lm-eval's tasks. May import training and the packages below it."""
