"""`layerskip_eval`: the quality of every exit, and lm-eval's tasks. Imports training and what lies below."""
