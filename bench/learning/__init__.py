"""Learning curves: each claim about the algorithm as one resumable command. See __main__.py."""
