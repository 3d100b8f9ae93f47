"""Conversion of models: rules per layer type, families of architectures, verification, checkpoints."""
