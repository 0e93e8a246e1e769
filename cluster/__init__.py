"""The machines that a run needs: mini-cluster, engine profiles, models, checks before a start."""
