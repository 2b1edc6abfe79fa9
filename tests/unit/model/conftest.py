"""Imports the package before any test imports transformers: a broken torchvision must be out of
the way first, as it is for whoever imports this package first.
"""

from __future__ import annotations

import longvila as longvila
