"""The errors this project raises: one family, so an entry point can turn any of them into one clear
line.

A message says what is wrong, where (file, line, key, value) and what to do about it. Each class
also derives from the built-in a caller would expect, so `except ValueError` keeps working for bad
input.
"""


class RellaxError(Exception):
    """Base of every error a user can cause or mend; the command line prints it as one line and
    exits non-zero.
    """


class ConfigError(RellaxError, ValueError):
    """A recipe, an override or a DeepSpeed JSON is wrong; names the key, the value and the nearest
    valid key.
    """


class TableError(RellaxError, ValueError):
    """A raw file or a table does not have the promised form; names the file, the line or column and
    the value.
    """


class ShardError(RellaxError, ValueError):
    """A shard or its index is missing, truncated or altered; names the shard, the offset and how to
    rebuild it.
    """


class AssetError(RellaxError, RuntimeError):
    """A named data set or model cannot be found, fetched or verified; names the sources tried and
    the remedy.
    """


class ArtifactError(RellaxError, RuntimeError):
    """A stage's artefact is absent, incomplete or in use; names the folder and the stage that
    writes it.
    """


class CheckpointError(RellaxError, RuntimeError):
    """A training checkpoint or adapter cannot be written, verified or restored."""


class KernelUnavailableError(RellaxError, RuntimeError):
    """A compute path was asked for that this machine does not have."""
