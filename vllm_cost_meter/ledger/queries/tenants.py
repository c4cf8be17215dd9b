"""Read the facts about tenants besides GPU time: phases, waste, KV cache and energy at a cut.

Costs are not computed here: `reports.allocation` computes the cost of every row.

Invariant: facts count up to the cut, as bills do.
"""

from collections.abc import Mapping

from sqlalchemy import and_, func, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.cut import Cut, bills_up_to
from vllm_cost_meter.ledger.queries.energy import by_tenant, class_energy
from vllm_cost_meter.ledger.schema import requests
from vllm_cost_meter.records.snapshot import OTHER_ROWS
from vllm_cost_meter.reports.answers import AfterCut
from vllm_cost_meter.reports.grammar import Question
from vllm_cost_meter.reports.tenant_details import TenantFacts


def tenant_facts(
    connection: Connection, cut: Cut, sums: Mapping[str, Mapping[str, int]], question: Question
) -> TenantFacts:
    """Return the facts about tenants and classes; `sums` has the sums of their bills."""
    return TenantFacts(
        sums=sums,
        cache_ms=cut.kv_cache_block_ms(),
        energies=by_tenant(connection, cut, question),
        class_energies={name: class_energy(cut, name) for name in OTHER_ROWS},
        unattributed_mj=cut.used_mj("unattributed"),
    )


def after_cut(connection: Connection, cut: Cut) -> AfterCut:
    """Return the bills of living runs that no snapshot counts yet, as the next one will."""
    last = {run.run_id: run.last_seq for run in cut.runs if run.alive}
    if not last:
        return {"bills": 0, "gpu_time_ns": 0}
    at, r = bills_up_to(last).c, requests.c
    # The outer join has the new bills of each run looked up in their key, and no others read.
    newer = and_(r.run_id == at.run_id, r.seq > at.last_seq)
    found = select(func.count(r.seq), func.sum(r.gpu_time_ns)).join_from(
        at.run_id.table, requests, newer, isouter=True
    )
    count, gpu_time_ns = connection.execute(found).one()
    return {"bills": int(count), "gpu_time_ns": int(gpu_time_ns or 0)}
