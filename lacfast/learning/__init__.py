"""What moves the weights: updates of policy and critic, optimizers, the KL's anchor, value pretraining."""
