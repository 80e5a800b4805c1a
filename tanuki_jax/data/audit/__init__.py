"""What a corpus consists of: a random sample, labelled by hand or by a judge, and shares with intervals."""

from tanuki_jax.data.audit.audit import Audit, open_audit
from tanuki_jax.data.audit.categories import read_categories
from tanuki_jax.data.audit.classify import label_by_judge
from tanuki_jax.data.audit.page import serve, write_page
from tanuki_jax.data.audit.shares import table

__all__ = ["Audit", "label_by_judge", "open_audit", "read_categories", "serve", "table", "write_page"]
