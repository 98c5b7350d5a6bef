"""The command line's jobs: train, evaluate, steer, demo; their recipes, directories and costs."""
