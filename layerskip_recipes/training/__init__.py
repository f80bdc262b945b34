"""`layerskip_finetune`: layer dropout and early-exit loss in training. Imports generation and below."""
