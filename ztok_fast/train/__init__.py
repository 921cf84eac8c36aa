"""Training: base-model pretraining, codec training, evaluation."""
