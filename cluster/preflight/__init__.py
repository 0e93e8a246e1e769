"""A look at a cluster before the first run on it: ``python -m cluster.preflight --config ...``.

Each check is a module: what it asks of a node (a function that runs there and gives facts), and a
pure judgement over the facts of all nodes, which gives faults. ``crew`` is how nodes are asked,
``ray_crew`` the one module here that imports Ray, ``inspection`` the order of it all.
"""

from jobs import signals

signals.listen_if_started_as("cluster.preflight")
