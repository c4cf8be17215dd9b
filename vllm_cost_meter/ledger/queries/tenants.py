"""Read the facts about tenants besides GPU time: phases, waste, KV cache and energy at a cut.

Costs are not computed here: `reports.allocation` computes the cost of every row.

Invariant: facts count up to the cut, as bills do.
"""

from collections.abc import Mapping

from sqlalchemy import func, or_, select
from sqlalchemy.engine import Connection

from vllm_cost_meter.ledger.queries.cut import Cut
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
    """Return the bills that no snapshot counts yet, as the next one will."""
    billed = select(func.count(), func.sum(requests.c.gpu_time_ns))
    if cut.runs:
        at = cut.cte()
        billed = billed.join_from(
            requests, at, requests.c.run_id == at.c.run_id, isouter=True
        ).where(or_(at.c.run_id.is_(None), requests.c.seq > at.c.last_seq))
    count, gpu_time_ns = connection.execute(billed).one()
    return {"bills": int(count), "gpu_time_ns": int(gpu_time_ns or 0)}
