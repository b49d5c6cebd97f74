"""Mathematics: tensors in, tensors out. Nothing here knows of files, models, runs or commands."""
