"""Other tools' files: mergekit's in and out, adapters out."""
