"""Dataset annotation: rows of any columns in, the same rows with typed answers out."""
