"""The training loop and what it needs: schedule, signals and sinks."""
