"""Pure training objectives.

An objective maps the log-probs of a micro-batch to one value per example (``dppo.types.Objective``). ``conf/loss``
lists them; ``_target_`` there is the only registry.

- ``sft``: supervised fine-tuning
- ``pairwise``: a chosen and a rejected answer
- ``penalised``: a pairwise base plus alpha f(r) on the reference model's own answer; f(r) in ``penalties``
"""
