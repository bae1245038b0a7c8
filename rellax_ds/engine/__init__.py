"""DeepSpeed behind few calls: configuration, processes, the engine, checkpoints and the launch."""
