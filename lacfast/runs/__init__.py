"""The command line's jobs: train, evaluate, steer, demo; their presets, directories and costs."""
