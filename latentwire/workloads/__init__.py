"""The workloads: models that the training loop can drive."""
