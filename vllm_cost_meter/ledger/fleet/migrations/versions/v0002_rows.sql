ALTER TABLE fleet_version ADD COLUMN oldest_sender BIGINT NOT NULL DEFAULT 1;
ALTER TABLE fleet_version ALTER COLUMN oldest_sender DROP DEFAULT;
ALTER TABLE senders ADD COLUMN rows TEXT NOT NULL DEFAULT 'fleet';
ALTER TABLE senders ALTER COLUMN rows DROP DEFAULT;
ALTER TABLE requests RENAME TO kept_requests;
ALTER TABLE usage_pieces RENAME TO kept_usage_pieces;
ALTER TABLE request_energy RENAME TO kept_request_energy;
ALTER TABLE open_requests RENAME TO kept_open_requests;
ALTER TABLE row_cutoffs RENAME TO kept_row_cutoffs;
ALTER TABLE dropped_bills RENAME TO kept_dropped_bills;
ALTER TABLE dropped_unknown_energy RENAME TO kept_dropped_unknown_energy;
ALTER INDEX requests_pkey RENAME TO kept_requests_pkey;
ALTER INDEX usage_pieces_pkey RENAME TO kept_usage_pieces_pkey;
ALTER INDEX request_energy_pkey RENAME TO kept_request_energy_pkey;
ALTER INDEX open_requests_pkey RENAME TO kept_open_requests_pkey;
ALTER INDEX row_cutoffs_pkey RENAME TO kept_row_cutoffs_pkey;
ALTER INDEX dropped_bills_pkey RENAME TO kept_dropped_bills_pkey;
ALTER INDEX dropped_unknown_energy_pkey RENAME TO kept_dropped_unknown_energy_pkey;
ALTER INDEX ix_open_requests_external_id RENAME TO ix_kept_open_requests_external_id;
ALTER INDEX ix_open_requests_response_id RENAME TO ix_kept_open_requests_response_id;
ALTER INDEX ix_open_requests_http_request_id RENAME TO ix_kept_open_requests_http_request_id;
ALTER INDEX ix_open_requests_x_request_id RENAME TO ix_kept_open_requests_x_request_id;
ALTER TABLE kept_requests ADD COLUMN external_tokens BIGINT;
ALTER TABLE kept_requests ADD COLUMN kv_role TEXT;
ALTER TABLE kept_open_requests ADD COLUMN kv_role TEXT;
ALTER TABLE sent_rollup_hours ADD COLUMN external_tokens BIGINT NOT NULL DEFAULT 0;
ALTER TABLE sent_rollup_hours ALTER COLUMN external_tokens DROP DEFAULT;
ALTER TABLE sent_rollup_hours ADD COLUMN external_known_tokens BIGINT NOT NULL DEFAULT 0;
ALTER TABLE sent_rollup_hours ALTER COLUMN external_known_tokens DROP DEFAULT;
ALTER TABLE dropped_hours ADD COLUMN external_tokens BIGINT NOT NULL DEFAULT 0;
ALTER TABLE dropped_hours ALTER COLUMN external_tokens DROP DEFAULT;
ALTER TABLE dropped_hours ADD COLUMN external_known_tokens BIGINT NOT NULL DEFAULT 0;
ALTER TABLE dropped_hours ALTER COLUMN external_known_tokens DROP DEFAULT;
CREATE TABLE folds (
    sender_id TEXT COLLATE "C" NOT NULL,
    folded_number BIGINT NOT NULL,
    PRIMARY KEY (sender_id)
);
CREATE TABLE sent_rollup_days (
    sender_id TEXT COLLATE "C" NOT NULL,
    first_number BIGINT NOT NULL,
    day INTEGER NOT NULL,
    group_id BIGINT NOT NULL,
    first_hour INTEGER,
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
    external_tokens BIGINT NOT NULL,
    external_known_tokens BIGINT NOT NULL,
    PRIMARY KEY (sender_id, first_number, day, group_id)
);
CREATE TABLE settings_changes (
    version BIGINT NOT NULL,
    section TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    position BIGINT,
    entry TEXT,
    PRIMARY KEY (version, section, name)
);
CREATE TABLE settings_versions (
    version BIGINT NOT NULL,
    format INTEGER NOT NULL,
    digest TEXT NOT NULL,
    is_restart BOOLEAN NOT NULL,
    changed_by TEXT NOT NULL,
    changed_at TEXT COLLATE "C" DEFAULT to_char(timezone('UTC', clock_timestamp() - make_interval(0, 0, 0, 0, 0, 0, 0.0)), 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') NOT NULL,
    changed_as TEXT DEFAULT session_user NOT NULL,
    PRIMARY KEY (version)
);
CREATE TABLE tails (
    sender_id TEXT COLLATE "C" NOT NULL,
    run_id TEXT COLLATE "C" NOT NULL,
    number BIGINT NOT NULL,
    bills TEXT NOT NULL,
    pieces TEXT NOT NULL,
    PRIMARY KEY (sender_id, run_id, number)
);
CREATE TABLE told_open_requests (
    sender_id TEXT COLLATE "C" NOT NULL,
    number BIGINT NOT NULL,
    opened TEXT NOT NULL,
    PRIMARY KEY (sender_id, number)
);
CREATE TABLE told_running (
    sender_id TEXT COLLATE "C" NOT NULL,
    number BIGINT NOT NULL,
    content TEXT NOT NULL,
    PRIMARY KEY (sender_id, number)
);
CREATE TABLE unsent_bills (
    run_id TEXT COLLATE "C" NOT NULL,
    first_seq BIGINT NOT NULL,
    last_seq BIGINT NOT NULL,
    host TEXT NOT NULL,
    kept_from_hour INTEGER NOT NULL,
    noticed_at TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (run_id, first_seq, last_seq)
);
CREATE INDEX ix_sent_rollup_hours_new ON sent_rollup_hours (first_number) WHERE first_number > -1;
