CREATE TABLE billed_hours (
    resource TEXT COLLATE "C" NOT NULL,
    kind TEXT COLLATE "C" NOT NULL,
    hour INTEGER NOT NULL,
    nanousd BIGINT NOT NULL,
    covered_ns BIGINT NOT NULL,
    unobserved_ns BIGINT NOT NULL,
    resets INTEGER NOT NULL,
    basis TEXT NOT NULL,
    PRIMARY KEY (resource, kind, hour)
);

CREATE INDEX ix_billed_hours_hour ON billed_hours (hour);

CREATE TABLE billing_snapshots (
    resource TEXT COLLATE "C" NOT NULL,
    taken_at TEXT COLLATE "C" NOT NULL,
    kind TEXT NOT NULL,
    cumulative_nanousd BIGINT,
    nanousd_per_hour BIGINT,
    source TEXT NOT NULL,
    imported_at TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (resource, taken_at)
);

CREATE TABLE cost_models (
    run_id TEXT COLLATE "C" NOT NULL,
    version INTEGER NOT NULL,
    taken_at TEXT COLLATE "C" NOT NULL,
    form TEXT NOT NULL,
    planes TEXT NOT NULL,
    curve TEXT,
    steps BIGINT NOT NULL,
    error_two_planes FLOAT NOT NULL,
    error_other_form FLOAT NOT NULL,
    explained FLOAT NOT NULL,
    charge_errors TEXT,
    PRIMARY KEY (run_id, version)
);

CREATE TABLE dropped_bills (
    run_id TEXT COLLATE "C" NOT NULL,
    bills BIGINT NOT NULL,
    last_seq BIGINT NOT NULL,
    gpu_time_ns BIGINT NOT NULL,
    digest BIGINT NOT NULL,
    method TEXT COLLATE "C" NOT NULL,
    started_at TEXT COLLATE "C" NOT NULL,
    finished_at TEXT COLLATE "C" NOT NULL,
    rest TEXT NOT NULL,
    PRIMARY KEY (run_id)
);

CREATE TABLE dropped_hours (
    hour INTEGER NOT NULL,
    group_id BIGINT NOT NULL,
    prefill_ns BIGINT NOT NULL,
    decode_ns BIGINT NOT NULL,
    prefill_tokens BIGINT NOT NULL,
    decode_tokens BIGINT NOT NULL,
    marginal_ns BIGINT NOT NULL,
    recomputed_ns BIGINT NOT NULL,
    recomputed_tokens BIGINT NOT NULL,
    rejected_ns BIGINT NOT NULL,
    rejected_tokens BIGINT NOT NULL,
    cut_ns BIGINT NOT NULL,
    cut_tokens BIGINT NOT NULL,
    kv_block_ms BIGINT NOT NULL,
    step_ns BIGINT NOT NULL,
    saved_estimate_ns BIGINT NOT NULL,
    charge_known_ns BIGINT NOT NULL,
    charge_error_ns BIGINT NOT NULL,
    requests BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    arrivals BIGINT NOT NULL,
    energy_mj BIGINT NOT NULL,
    energies BIGINT NOT NULL,
    PRIMARY KEY (hour, group_id)
);

CREATE TABLE dropped_latencies (
    hour INTEGER NOT NULL,
    measure TEXT COLLATE "C" NOT NULL,
    about_us BIGINT NOT NULL,
    run_id TEXT COLLATE "C" NOT NULL,
    exchanges BIGINT NOT NULL,
    sum_us BIGINT NOT NULL,
    PRIMARY KEY (hour, measure, about_us, run_id)
);

CREATE TABLE dropped_unknown_energy (
    hour INTEGER NOT NULL,
    later_hour INTEGER NOT NULL,
    group_id BIGINT NOT NULL,
    bills BIGINT NOT NULL,
    PRIMARY KEY (hour, later_hour, group_id)
);

CREATE TABLE fleet_sender (
    sender_id TEXT COLLATE "C" NOT NULL,
    retired TEXT NOT NULL,
    began_at TEXT COLLATE "C" NOT NULL,
    last_number BIGINT NOT NULL,
    sent_number BIGINT NOT NULL,
    joined_at TEXT COLLATE "C",
    PRIMARY KEY (sender_id)
);

CREATE TABLE http_requests (
    http_request_id TEXT COLLATE "C" NOT NULL,
    response_id TEXT COLLATE "C",
    x_request_id TEXT COLLATE "C",
    tenant TEXT COLLATE "C" NOT NULL,
    tenant_rule TEXT NOT NULL,
    tenant_above TEXT COLLATE "C",
    model TEXT,
    route TEXT NOT NULL,
    status INTEGER NOT NULL,
    streamed BOOLEAN NOT NULL,
    prompt_tokens BIGINT,
    cached_tokens BIGINT,
    output_tokens BIGINT,
    gpu_time_ns BIGINT,
    cost_nanousd BIGINT,
    started_at BIGINT NOT NULL,
    finished_at BIGINT NOT NULL,
    PRIMARY KEY (http_request_id)
);

CREATE INDEX ix_http_requests_finished ON http_requests (finished_at);

CREATE INDEX ix_http_requests_response_id ON http_requests (response_id) WHERE response_id IS NOT NULL;

CREATE INDEX ix_http_requests_tenant ON http_requests (tenant, finished_at);

CREATE INDEX ix_http_requests_x_request_id ON http_requests (x_request_id) WHERE x_request_id IS NOT NULL;

CREATE TABLE invoice_lines (
    resource TEXT COLLATE "C" NOT NULL,
    begins_at TEXT COLLATE "C" NOT NULL,
    ends_at TEXT COLLATE "C" NOT NULL,
    invoice TEXT COLLATE "C" NOT NULL,
    item TEXT COLLATE "C" NOT NULL,
    charge_class TEXT COLLATE "C" NOT NULL,
    kind TEXT NOT NULL,
    nanousd BIGINT NOT NULL,
    source TEXT NOT NULL,
    imported_at TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (resource, begins_at, ends_at, invoice, item, charge_class)
);

CREATE TABLE journal_losses (
    journal_id TEXT COLLATE "C" NOT NULL,
    after_number BIGINT NOT NULL,
    records BIGINT NOT NULL,
    reason TEXT NOT NULL,
    noticed_at TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (journal_id, after_number)
);

CREATE TABLE journals (
    journal_id TEXT COLLATE "C" NOT NULL,
    segment BIGINT NOT NULL,
    offset_bytes BIGINT NOT NULL,
    number BIGINT NOT NULL,
    applied_at TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (journal_id)
);

CREATE TABLE open_requests (
    request_id TEXT COLLATE "C" NOT NULL,
    started_at BIGINT NOT NULL,
    external_id TEXT COLLATE "C",
    response_id TEXT COLLATE "C",
    http_request_id TEXT COLLATE "C",
    x_request_id TEXT COLLATE "C",
    prompt_group TEXT COLLATE "C" NOT NULL,
    tenant TEXT COLLATE "C" NOT NULL,
    tenant_rule TEXT NOT NULL,
    tenant_parent TEXT COLLATE "C",
    tags TEXT,
    tenant_above TEXT COLLATE "C",
    model TEXT,
    lora TEXT,
    route TEXT,
    PRIMARY KEY (request_id, started_at)
);

CREATE INDEX ix_open_requests_external_id ON open_requests (external_id);

CREATE INDEX ix_open_requests_http_request_id ON open_requests (http_request_id);

CREATE INDEX ix_open_requests_response_id ON open_requests (response_id);

CREATE INDEX ix_open_requests_x_request_id ON open_requests (x_request_id);

CREATE TABLE outbox (
    number BIGINT NOT NULL,
    content BYTEA NOT NULL,
    PRIMARY KEY (number)
);

CREATE TABLE prices (
    price_id TEXT COLLATE "C" NOT NULL,
    usd_per_gpu_hour TEXT NOT NULL,
    source TEXT NOT NULL,
    effective_from TEXT COLLATE "C" NOT NULL,
    usd_per_kv_block_hour TEXT,
    PRIMARY KEY (price_id)
);

CREATE TABLE request_energy (
    run_id TEXT COLLATE "C" NOT NULL,
    seq BIGINT NOT NULL,
    hour INTEGER NOT NULL,
    energy_mj BIGINT,
    reason TEXT,
    PRIMARY KEY (run_id, seq, hour)
);

CREATE TABLE requests (
    run_id TEXT COLLATE "C" NOT NULL,
    seq BIGINT NOT NULL,
    request_id TEXT COLLATE "C" NOT NULL,
    external_id TEXT COLLATE "C",
    response_id TEXT COLLATE "C",
    http_request_id TEXT COLLATE "C",
    prompt_group TEXT COLLATE "C" NOT NULL,
    tenant TEXT COLLATE "C" NOT NULL,
    tenant_rule TEXT NOT NULL,
    tenant_parent TEXT COLLATE "C",
    tags TEXT,
    tenant_above TEXT COLLATE "C",
    model TEXT,
    lora TEXT,
    route TEXT,
    engine_status TEXT NOT NULL,
    method TEXT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    prefill_tokens BIGINT NOT NULL,
    decode_tokens BIGINT NOT NULL,
    gpu_time_ns BIGINT NOT NULL,
    prefill_ns BIGINT NOT NULL,
    decode_ns BIGINT NOT NULL,
    cost_nanousd BIGINT,
    marginal_ns BIGINT NOT NULL,
    marginal_cost_nanousd BIGINT,
    recomputed_ns BIGINT NOT NULL,
    recomputed_tokens BIGINT NOT NULL,
    rejected_ns BIGINT NOT NULL,
    rejected_tokens BIGINT NOT NULL,
    cut_ns BIGINT NOT NULL,
    cut_tokens BIGINT NOT NULL,
    kv_block_ms BIGINT NOT NULL,
    step_ns BIGINT NOT NULL,
    saved_estimate_ns BIGINT NOT NULL,
    preemptions INTEGER NOT NULL,
    steps BIGINT NOT NULL,
    batch BIGINT NOT NULL,
    first_model INTEGER NOT NULL,
    last_model INTEGER NOT NULL,
    started_at BIGINT NOT NULL,
    finished_at BIGINT NOT NULL,
    queue_us FLOAT,
    ttft_us FLOAT,
    tpot_us FLOAT,
    e2e_us FLOAT,
    hour INTEGER,
    charge_error_ns BIGINT,
    ended_at BIGINT DEFAULT 0 NOT NULL,
    reply_status INTEGER,
    reply_streamed BOOLEAN,
    reply_started_at BIGINT,
    reply_told INTEGER,
    reply_gpu_time_ns BIGINT,
    reply_cost_nanousd BIGINT,
    x_request_id TEXT COLLATE "C",
    PRIMARY KEY (run_id, seq)
);

CREATE INDEX ix_requests_ended_at ON requests (ended_at);

CREATE INDEX ix_requests_external_id ON requests (external_id) WHERE substr(request_id, 1, length(external_id)) <> external_id;

CREATE INDEX ix_requests_http ON requests (http_request_id);

CREATE INDEX ix_requests_request_id ON requests (request_id);

CREATE INDEX ix_requests_response_id ON requests (response_id) WHERE substr(request_id, 1, length(response_id)) <> response_id;

CREATE INDEX ix_requests_tenant ON requests (tenant, ended_at);

CREATE INDEX ix_requests_x_request_id ON requests (x_request_id) WHERE x_request_id IS NOT NULL;

CREATE TABLE rollup_groups (
    group_id BIGINT NOT NULL,
    run_id TEXT COLLATE "C" NOT NULL,
    tenant TEXT COLLATE "C" NOT NULL,
    tenant_rule TEXT COLLATE "C" NOT NULL,
    tenant_parent TEXT COLLATE "C",
    tags TEXT COLLATE "C",
    tenant_above TEXT COLLATE "C",
    model TEXT COLLATE "C",
    lora TEXT COLLATE "C",
    route TEXT COLLATE "C",
    engine_status TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (group_id)
);

CREATE INDEX ix_rollup_groups_tenant ON rollup_groups (tenant, tenant_above);

CREATE TABLE row_cutoffs (
    kept_from_hour INTEGER NOT NULL,
    decided_at TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (kept_from_hour)
);

CREATE TABLE runs (
    run_id TEXT COLLATE "C" NOT NULL,
    engine_index INTEGER NOT NULL,
    model TEXT NOT NULL,
    gpus INTEGER NOT NULL,
    hardware TEXT NOT NULL,
    parallelism TEXT NOT NULL,
    kv_blocks BIGINT,
    kv_block_size INTEGER,
    host TEXT NOT NULL,
    precision TEXT NOT NULL,
    method TEXT NOT NULL,
    vllm_version TEXT NOT NULL,
    meter_version TEXT NOT NULL,
    native BOOLEAN NOT NULL,
    started_at TEXT COLLATE "C" NOT NULL,
    price_id TEXT COLLATE "C",
    devices TEXT,
    labels TEXT,
    preemption_paid_by TEXT NOT NULL,
    PRIMARY KEY (run_id)
);

CREATE TABLE saturation_points (
    point_id TEXT COLLATE "C" NOT NULL,
    measured_at TEXT COLLATE "C" NOT NULL,
    model TEXT NOT NULL,
    precision TEXT NOT NULL,
    vllm_version TEXT NOT NULL,
    hardware TEXT NOT NULL,
    gpus INTEGER NOT NULL,
    parallelism TEXT NOT NULL,
    engines INTEGER NOT NULL,
    input_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    output_tokens_per_s FLOAT NOT NULL,
    requests_per_s FLOAT NOT NULL,
    window_s FLOAT NOT NULL,
    protocol TEXT NOT NULL,
    PRIMARY KEY (point_id)
);

CREATE TABLE schema_version (
    version SERIAL NOT NULL,
    PRIMARY KEY (version)
);

CREATE TABLE usage_pieces (
    run_id TEXT COLLATE "C" NOT NULL,
    seq BIGINT NOT NULL,
    hour INTEGER NOT NULL,
    tenant TEXT COLLATE "C" NOT NULL,
    prefill_ns BIGINT NOT NULL,
    decode_ns BIGINT NOT NULL,
    prefill_tokens BIGINT NOT NULL,
    decode_tokens BIGINT NOT NULL,
    marginal_ns BIGINT NOT NULL,
    recomputed_ns BIGINT NOT NULL,
    recomputed_tokens BIGINT NOT NULL,
    rejected_ns BIGINT NOT NULL,
    rejected_tokens BIGINT NOT NULL,
    cut_ns BIGINT NOT NULL,
    cut_tokens BIGINT NOT NULL,
    kv_block_ms BIGINT NOT NULL,
    step_ns BIGINT NOT NULL,
    saved_estimate_ns BIGINT NOT NULL,
    charge_error_ns BIGINT,
    PRIMARY KEY (run_id, seq, hour)
);

CREATE TABLE fleet_version (
    version BIGSERIAL NOT NULL,
    PRIMARY KEY (version)
);

CREATE TABLE retired_senders (
    sender_id TEXT COLLATE "C" NOT NULL,
    successor_id TEXT COLLATE "C" NOT NULL,
    retired_at TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (sender_id)
);

CREATE TABLE run_senders (
    run_id TEXT COLLATE "C" NOT NULL,
    sender_id TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (run_id, sender_id)
);

CREATE TABLE sender_ends (
    sender_id TEXT COLLATE "C" NOT NULL,
    last_number BIGINT NOT NULL,
    ended_at TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (sender_id, last_number)
);

CREATE TABLE senders (
    sender_id TEXT COLLATE "C" NOT NULL,
    host TEXT NOT NULL,
    meter_version TEXT NOT NULL,
    joined_at TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (sender_id)
);

CREATE TABLE sent_bill_sums (
    sender_id TEXT COLLATE "C" NOT NULL,
    first_number BIGINT NOT NULL,
    run_id TEXT COLLATE "C" NOT NULL,
    bills BIGINT NOT NULL,
    last_seq BIGINT NOT NULL,
    gpu_time_ns BIGINT NOT NULL,
    digest BIGINT NOT NULL,
    method TEXT COLLATE "C" NOT NULL,
    started_at TEXT COLLATE "C" NOT NULL,
    finished_at TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (sender_id, first_number, run_id)
);

CREATE INDEX ix_sent_bill_sums_run_id ON sent_bill_sums (run_id);

CREATE TABLE sent_energy_sums (
    sender_id TEXT COLLATE "C" NOT NULL,
    first_number BIGINT NOT NULL,
    run_id TEXT COLLATE "C" NOT NULL,
    energy_mj BIGINT NOT NULL,
    PRIMARY KEY (sender_id, first_number, run_id)
);

CREATE INDEX ix_sent_energy_sums_run_id ON sent_energy_sums (run_id);

CREATE TABLE sent_rollup_arrivals (
    sender_id TEXT COLLATE "C" NOT NULL,
    first_number BIGINT NOT NULL,
    hour INTEGER NOT NULL,
    exchanges BIGINT NOT NULL,
    PRIMARY KEY (sender_id, first_number, hour)
);

CREATE INDEX ix_sent_rollup_arrivals_hour ON sent_rollup_arrivals (hour);

CREATE TABLE sent_rollup_hours (
    sender_id TEXT COLLATE "C" NOT NULL,
    first_number BIGINT NOT NULL,
    hour INTEGER NOT NULL,
    group_id BIGINT NOT NULL,
    prefill_ns BIGINT NOT NULL,
    decode_ns BIGINT NOT NULL,
    prefill_tokens BIGINT NOT NULL,
    decode_tokens BIGINT NOT NULL,
    marginal_ns BIGINT NOT NULL,
    recomputed_ns BIGINT NOT NULL,
    recomputed_tokens BIGINT NOT NULL,
    rejected_ns BIGINT NOT NULL,
    rejected_tokens BIGINT NOT NULL,
    cut_ns BIGINT NOT NULL,
    cut_tokens BIGINT NOT NULL,
    kv_block_ms BIGINT NOT NULL,
    step_ns BIGINT NOT NULL,
    saved_estimate_ns BIGINT NOT NULL,
    charge_known_ns BIGINT NOT NULL,
    charge_error_ns BIGINT NOT NULL,
    requests BIGINT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    PRIMARY KEY (sender_id, first_number, hour, group_id)
);

CREATE INDEX ix_sent_rollup_hours_hour ON sent_rollup_hours (hour);

CREATE TABLE sent_rollup_latencies (
    sender_id TEXT COLLATE "C" NOT NULL,
    first_number BIGINT NOT NULL,
    hour INTEGER NOT NULL,
    measure TEXT COLLATE "C" NOT NULL,
    about_us BIGINT NOT NULL,
    exchanges BIGINT NOT NULL,
    sum_us BIGINT NOT NULL,
    PRIMARY KEY (sender_id, first_number, hour, measure, about_us)
);

CREATE INDEX ix_sent_rollup_latencies_hour ON sent_rollup_latencies (hour);

CREATE TABLE shared_runs (
    run_id TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (run_id)
);

CREATE TABLE shipments (
    sender_id TEXT COLLATE "C" NOT NULL,
    first_number BIGINT NOT NULL,
    last_number BIGINT NOT NULL,
    last_digest TEXT NOT NULL,
    sent_at TEXT COLLATE "C" NOT NULL,
    received_at TEXT COLLATE "C" NOT NULL,
    interval_s FLOAT NOT NULL,
    PRIMARY KEY (sender_id, first_number)
);

CREATE TABLE told_energy_hours (
    run_id TEXT COLLATE "C" NOT NULL,
    hour INTEGER NOT NULL,
    number BIGINT NOT NULL,
    requests_mj BIGINT NOT NULL,
    in_flight_mj BIGINT NOT NULL,
    idle_mj BIGINT NOT NULL,
    sleep_mj BIGINT NOT NULL,
    tail_mj BIGINT NOT NULL,
    dummy_mj BIGINT NOT NULL,
    recomputed_mj BIGINT NOT NULL,
    host_mj BIGINT NOT NULL,
    lost_mj BIGINT NOT NULL,
    unattributed_mj BIGINT NOT NULL,
    told_at TEXT COLLATE "C" DEFAULT to_char(timezone('UTC', clock_timestamp() - make_interval(0, 0, 0, 0, 0, 0, 0.0)), 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') NOT NULL,
    PRIMARY KEY (run_id, hour, number)
);

CREATE TABLE told_engine_hours (
    run_id TEXT COLLATE "C" NOT NULL,
    hour INTEGER NOT NULL,
    number BIGINT NOT NULL,
    requests_ns BIGINT NOT NULL,
    in_flight_ns BIGINT NOT NULL,
    idle_ns BIGINT NOT NULL,
    sleep_ns BIGINT NOT NULL,
    startup_ns BIGINT NOT NULL,
    tail_ns BIGINT NOT NULL,
    dummy_ns BIGINT NOT NULL,
    recomputed_ns BIGINT NOT NULL,
    host_ns BIGINT NOT NULL,
    lost_ns BIGINT NOT NULL,
    told_at TEXT COLLATE "C" DEFAULT to_char(timezone('UTC', clock_timestamp() - make_interval(0, 0, 0, 0, 0, 0, 0.0)), 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') NOT NULL,
    PRIMARY KEY (run_id, hour, number)
);

CREATE TABLE told_live_usage (
    run_id TEXT COLLATE "C" NOT NULL,
    number BIGINT NOT NULL,
    taken_at TEXT COLLATE "C" NOT NULL,
    live_ns BIGINT NOT NULL,
    step_ns BIGINT NOT NULL,
    requests TEXT NOT NULL,
    told_at TEXT COLLATE "C" DEFAULT to_char(timezone('UTC', clock_timestamp() - make_interval(0, 0, 0, 0, 0, 0, 0.0)), 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') NOT NULL,
    PRIMARY KEY (run_id, number)
);

CREATE INDEX ix_told_live_usage_told_at ON told_live_usage (told_at);

CREATE TABLE told_snapshots (
    run_id TEXT COLLATE "C" NOT NULL,
    number BIGINT NOT NULL,
    taken_at TEXT COLLATE "C" NOT NULL,
    wall_ns BIGINT NOT NULL,
    requests_ns BIGINT NOT NULL,
    in_flight_ns BIGINT NOT NULL,
    idle_ns BIGINT NOT NULL,
    sleep_ns BIGINT NOT NULL,
    startup_ns BIGINT NOT NULL,
    tail_ns BIGINT NOT NULL,
    dummy_ns BIGINT NOT NULL,
    recomputed_ns BIGINT NOT NULL,
    host_ns BIGINT NOT NULL,
    lost_ns BIGINT NOT NULL,
    last_seq BIGINT NOT NULL,
    billed_ns BIGINT NOT NULL,
    running INTEGER NOT NULL,
    waiting INTEGER NOT NULL,
    kv_cache_usage FLOAT,
    steps BIGINT NOT NULL,
    busy_ns BIGINT NOT NULL,
    own_ns BIGINT NOT NULL,
    errors BIGINT NOT NULL,
    state TEXT NOT NULL,
    prior TEXT NOT NULL,
    energy_mj BIGINT,
    requests_mj BIGINT,
    in_flight_mj BIGINT,
    idle_mj BIGINT,
    sleep_mj BIGINT,
    tail_mj BIGINT,
    dummy_mj BIGINT,
    recomputed_mj BIGINT,
    host_mj BIGINT,
    lost_mj BIGINT,
    unattributed_mj BIGINT,
    energy_unknown_ns BIGINT,
    energy_reason TEXT,
    told_at TEXT COLLATE "C" DEFAULT to_char(timezone('UTC', clock_timestamp() - make_interval(0, 0, 0, 0, 0, 0, 0.0)), 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') NOT NULL,
    PRIMARY KEY (run_id, number)
);

CREATE INDEX ix_told_snapshots_told_at ON told_snapshots (told_at);
