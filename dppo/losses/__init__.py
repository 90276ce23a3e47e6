"""Pure training objectives.

An objective maps the log-probs of a micro-batch to one value per example (``dppo.types.Objective``). ``conf/loss``
lists them; ``_target_`` there is the only registry.

- ``sft``: supervised fine-tuning
- ``pairwise``: a chosen and a rejected answer
- ``ranked``: any number of answers with scores
- ``unpaired``: single answers, desirable or undesirable
- ``penalised``: a pairwise base plus alpha f(r) on the reference model's own answer; f(r) in ``penalties``

The docstring of a loss or penalty holds what is known about it, for readers and for ``python -m dppo.methods``: a
title, facts that begin with a label at the start of a line, and notes. The labels: Paper; Formula; Length, what is
divided by a number of tokens; At policy = reference, its value there (where the reference is in it); Bounds;
Elsewhere, how print and other implementations differ; Rewards and Metrics, what is logged; State, of the statistics.
"""
