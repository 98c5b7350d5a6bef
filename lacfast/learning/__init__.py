"""What moves the weights: pairs, minibatches, the updates of policy and critic, value pretraining."""
