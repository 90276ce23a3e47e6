"""Hostile input: command lines, data files, model folders and run directories that nobody should give.

``python -m tests.fuzz --minutes 10 --seed 0`` makes cases until the time is over. A case is right if it ends with a
correct run (exit status 0) or with one clear line (exit status 2), leaves nothing by halves, and writes nowhere but
below outputs/ and what the words name.
"""
