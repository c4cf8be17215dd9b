"""The page on metrics names every metric of the meter, its labels, and nothing else."""

import re

from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase

from tests.support.pages import DOCS, section, table_rows
from vllm_cost_meter.metrics import owners, series
from vllm_cost_meter.records.snapshot import CLASSES

PAGE = DOCS / "reference" / "metrics.md"
METRICS = [
    value
    for module in (series, owners)
    for value in vars(module).values()
    if isinstance(value, MetricWrapperBase)
]


def queried_name(metric: MetricWrapperBase) -> str:
    return metric._name + ("_total" if isinstance(metric, Counter) else "")


def tables(kind: str) -> dict[str, list[str]]:
    """Return name and labels of each metric in the section of a kind."""
    rows = table_rows(section(PAGE, kind))
    cells = [[re.sub(r" \(.*?\)", "", cell) for cell in row] for row in rows]
    return {row[0].strip("`"): re.findall("`(.*?)`", row[1]) for row in cells}


def test_every_metric_is_documented_with_its_labels_and_no_other():
    kinds = {"counter": "Counters", "gauge": "Gauges", "histogram": "Histograms"}
    for kind, heading in kinds.items():
        ours = {queried_name(m): list(m._labelnames) for m in METRICS if m._type == kind}
        assert tables(heading) == ours
    assert {m._type for m in METRICS} == set(kinds)


def test_every_metric_in_a_query_exists():
    asked = set(re.findall(r"cost_meter_\w+", section(PAGE, "Queries")))
    assert asked <= {queried_name(metric) for metric in METRICS}


def test_the_classes_are_all_named():
    row = next(r for r in table_rows(PAGE.read_text()) if "engine_gpu_seconds" in r[0])
    assert re.findall("`(.*?)`", row[2]) == list(CLASSES)


def test_the_limit_of_tenant_labels_is_as_documented():
    assert f"{owners.TENANT_LABELS_MAX:,} tenants" in PAGE.read_text()


def test_no_name_looks_like_one_of_vllms():
    assert all(m._name.startswith("cost_meter_") and "vllm" not in m._name for m in METRICS)
