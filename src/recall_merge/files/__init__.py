"""Files: checkpoints, adapters, rows, results. Nothing here knows of models' forward passes, recipes or commands."""
