"""Each architecture that can be built tiny does what docs/architectures.md says: right beside transformers and PEFT, or refused by name."""

from __future__ import annotations

import pytest

import architectures

ROWS = dict(architectures.rows_of(architectures.PAGE.read_text("utf-8")))


@pytest.mark.parametrize("model_type", sorted(ROWS))
def test_an_architecture_does_what_the_page_says(model_type, tmp_path):
    assert architectures.outcomes(model_type, tmp_path) == ROWS[model_type]


def test_most_architectures_merge_exactly():
    exact = [model_type for model_type, row in ROWS.items() if row["merge"] == row["adapter"] == row["recall"] == architectures.YES]
    assert len(exact) >= 60
    assert not any(reason.startswith("CRASH") for row in ROWS.values() for reason in row.values())
