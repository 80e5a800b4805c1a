"""What is dropped of rows before they are trained on, and why: `tanuki data filter`, and `filters` of a source."""

from tanuki_jax.data.filters.filtered_files import Summary, filter_files
from tanuki_jax.data.filters.filtering import REASONS, filter_rows

VERSION = 2  # of what filters drop; sources that another version has filtered are filtered anew

__all__ = ["REASONS", "VERSION", "Summary", "filter_files", "filter_rows"]
