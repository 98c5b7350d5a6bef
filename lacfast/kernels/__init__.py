"""Triton kernels: the repository's kernels/ folder, installed here and found there in a bare source tree."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
# The sibling csrc/ tells our checkout from a site-packages that holds Hugging Face's package `kernels`.
if (_ROOT / "csrc").is_dir() and str(_ROOT / "kernels") not in __path__:
    __path__.append(str(_ROOT / "kernels"))
