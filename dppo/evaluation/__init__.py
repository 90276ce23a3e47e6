"""How two models' answers compare: win rates with intervals, drift from the reference, text statistics."""
