"""Every test runs under the guards an entry point puts up, before any library reads them."""

from rellax_ds import runtime

runtime.guard_environment()
