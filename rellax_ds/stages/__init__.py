"""The eight stages: the pipeline read top to bottom, each a function from committed artefacts to
one new artefact.
"""
