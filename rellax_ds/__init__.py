"""rellax_ds: fine-tune LLMs for recommendation over lifelong behaviour (ReLLaX, arXiv 2501.13344).

Importing the package pulls in no heavy dependency; rooms are imported by name. Its one side effect
is that PEFT knows the method CFLORA wherever both are imported.
"""

from rellax_ds import plugin

__version__ = "0.1.0"

plugin.install()
