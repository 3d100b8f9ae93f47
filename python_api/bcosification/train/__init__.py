"""Training: data, losses, schedules of B and biases, the Lightning module, fine-tuning from a configuration.

Importing this package loads none of the extra's libraries; its modules do.
"""
