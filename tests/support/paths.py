"""Where the checkout lies."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Real texts beside a developer's checkout; tests that need them are skipped where they are absent."""
