"""Chaos: the real job on a real mini-cluster, with everything killed that can be.

corpus          the input: good rows with known answers, and poison rows of eight kinds
fragile_engine  engines that poison kills, and that write down every finished generation
ledger          that book: what was generated, when, by which process
nightly         the nightly job with such an engine
proxy           faults before the S3 server
victims         finding the processes of a run
campaign        a run under fire: kill after kill, start after start, to its end
judge           what was promised against what came out
run             the command line: ``python -m tests.chaos.run``
signals         every job, stopped at random moments: ``python -m tests.chaos.signals``
"""
