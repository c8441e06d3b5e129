"""Code for transformers.  `export_model` copies both files, unchanged, into the folders that it writes."""
