"""What every room may use: errors, files, paths, numbers that are not finite, provenance, plots and tables."""

from .errors import NotFinite, UserError, counted, located, require, require_known, require_range, unknown

__all__ = ["NotFinite", "UserError", "counted", "located", "require", "require_known", "require_range", "unknown"]
