"""``make bench``: this pipeline beside other ways to run the same rows through the same engine."""
