"""A discrete-event model of the cluster that runs the pipeline's own planning and scheduling code.

    workload.py   rows: prompt and completion tokens
    engine.py     one engine: continuous batching on a token-rate curve
    replica.py    one replica: open shards, the real backlog and admission window, its engine
    cluster.py    the event loop: prepare, the giving of shards to replicas, losses
    policies.py   what is compared: the pipeline's scheduling, and FIFO with equal shards
    driver.py     what a million rows cost the driver, measured on the real code
    paced.py      a real ``Engine`` that sleeps by the model's curve, for the validation
    validation.py the real pipeline on that engine beside the model
    page.py       docs/simulation.md; plots.py its pictures

``python -m cluster.simulation`` runs it all.
"""
