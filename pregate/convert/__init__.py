"""Dense checkpoints to routed ones: calibration, CMoE, decoupling, evaluation."""
