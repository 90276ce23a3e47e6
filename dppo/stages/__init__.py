"""The stages of a run, each from artifacts to an artifact or a growing store. Stages never import each other."""
