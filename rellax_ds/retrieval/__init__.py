"""SUBR, semantic user behaviour retrieval (stages 2 and 3): item text to vectors, vectors to the
behaviours most like the target.
"""
