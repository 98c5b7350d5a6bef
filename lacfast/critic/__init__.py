"""The critic: trunk, head, value loss, and the values of a rollout."""
