"""The recipes that ship with the package: YAML files, loaded by name with `rellax_ds.config`."""
