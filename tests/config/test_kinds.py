"""The table of stage kinds is the only place that names them."""

import re
from pathlib import Path

from tanuki_jax import config
from tanuki_jax.data.layouts import LAYOUTS
from tanuki_jax.train.losses import LOSSES

PACKAGE = Path(config.__file__).parents[1]
NAMED = re.compile(rf"""kind\b[^\n]{{0,12}}(==|!=|\bin\b)\s*[(\[{{]?["']({"|".join(config.STAGE_KINDS)})["']""")


def test_no_code_asks_for_a_kind_by_name():
    assert NAMED.search('if stage.kind == "dpo":') and NAMED.search("options.kind in ('sft', 'dpo')")
    found = [str(path) for path in PACKAGE.rglob("*.py") if NAMED.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_what_a_kind_names_is_there():
    for kind in config.STAGE_KINDS.values():
        assert not kind.trains or (kind.loss in LOSSES and kind.layout in LAYOUTS and kind.rows)
        assert kind.trains or not (kind.layout or kind.rows or kind.batch)
