"""Searches over hyperparameters with Optuna: what is searched, which trial comes next, and what came out.

Nothing here knows Hydra; ``hydra_plugins.dppo_sweeper`` connects the two.
"""
