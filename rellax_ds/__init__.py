"""rellax_ds: fine-tune LLMs for recommendation over lifelong behaviour (ReLLaX, arXiv 2501.13344).

Importing the package has no side effect and pulls in no heavy dependency; rooms are imported by
name.
"""

__version__ = "0.1.0"
