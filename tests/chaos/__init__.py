"""Kills at random moments, and what is left compared with what an undisturbed run leaves."""
