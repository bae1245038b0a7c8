"""Before a run: what a training will need, from the recipe, the DeepSpeed JSON and the backbone's
config alone. `estimate` puts it together; docs/planning.md explains every formula.
"""
