"""The recipes of `tune run layerskip_finetune`, `layerskip_generate` and `layerskip_eval`: wiring only."""
