"""Audit a run from its folder alone, and replay a sample of its records.

checks    what is checked, and what was found wrong
recorded  a run as its folder has it: config, engine, plan
columns   a part's records as arrays, and their totals
parts     one part against the plan, its records and its footer
audit     all parts, and what the run says of itself
choose    which records are replayed: the same ones each time
replay    those records through the engine once more (asked: with which parameters)
compare   what differs, and why it may
row       one row as the engine saw it
outcome   what people and programs get to see of it all
"""
