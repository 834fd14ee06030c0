"""One realistic report for all tests of this folder."""

import copy
import json
from typing import Any

import pytest

from emlens.reports.document import make_report
from tests.reports.synthetic import make_diff, make_extra, make_null, make_proof, make_training


@pytest.fixture(scope="session")
def _report() -> dict[str, Any]:
    results = [make_proof(), make_diff(n_chats=4), make_null(), make_training()]
    made = make_report(results, extra=make_extra())
    return json.loads(json.dumps(made))


@pytest.fixture
def report(_report: dict[str, Any]) -> dict[str, Any]:
    """Its JSON, to be changed at will."""
    return copy.deepcopy(_report)
