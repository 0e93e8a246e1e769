"""Offline evaluation: a benchmark's requests as a feed through the pipeline, scored by lm-eval.

config     tasks, their data and settings
data       published Parquet and JSONL layouts -> data sets, from a folder or a bucket
harness    lm-eval's tasks on that data: what they ask, and what they make of the answers
feed_lm    lm-eval's ``LM``: requests in its terms -> requests of the pipeline, and back
feed       each distinct request once, as OpenAI batch JSONL
answers    the run's records, by request
scores     lm-eval's results -> scores with confidence intervals, by subject, and items
sandbox    model-written programs, confined (``jail``)
page       evaluation.json, evaluation.html, the table on stderr
"""
