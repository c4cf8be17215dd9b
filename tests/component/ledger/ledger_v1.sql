BEGIN TRANSACTION;
CREATE TABLE engine_hours (
	run_id TEXT NOT NULL, 
	hour INTEGER NOT NULL, 
	number BIGINT NOT NULL, 
	requests_ns BIGINT NOT NULL, 
	in_flight_ns BIGINT NOT NULL, 
	idle_ns BIGINT NOT NULL, 
	sleep_ns BIGINT NOT NULL, 
	startup_ns BIGINT NOT NULL, 
	tail_ns BIGINT NOT NULL, 
	dummy_ns BIGINT NOT NULL, 
	host_ns BIGINT NOT NULL, 
	lost_ns BIGINT NOT NULL, 
	PRIMARY KEY (run_id, hour)
);
INSERT INTO "engine_hours" VALUES('run',500000,1,300,0,1000,0,0,0,0,50,0);
CREATE TABLE http_requests (
	http_request_id TEXT NOT NULL, 
	response_id TEXT, 
	x_request_id TEXT, 
	tenant TEXT NOT NULL, 
	model TEXT, 
	route TEXT NOT NULL, 
	status INTEGER NOT NULL, 
	streamed BOOLEAN NOT NULL, 
	prompt_tokens BIGINT, 
	cached_tokens BIGINT, 
	output_tokens BIGINT, 
	gpu_time_ns BIGINT, 
	cost_nanousd BIGINT, 
	cost_usd TEXT, 
	started_at TEXT NOT NULL, 
	finished_at TEXT NOT NULL, 
	PRIMARY KEY (http_request_id)
);
INSERT INTO "http_requests" VALUES('cost-1','chatcmpl-1','mine','search','m','/v1/chat/completions',200,0,10,2,5,300,7,'0.000000007','2027-01-15T08:00:00.000000Z','2027-01-15T08:00:01.000000Z');
CREATE TABLE prices (
	price_id TEXT NOT NULL, 
	usd_per_gpu_hour TEXT NOT NULL, 
	source TEXT NOT NULL, 
	effective_from TEXT NOT NULL, 
	PRIMARY KEY (price_id)
);
INSERT INTO "prices" VALUES('settings:2.5','2.5','COST_METER_GPU_HOUR_USD','1970-01-01T00:00:00.000000Z');
CREATE TABLE requests (
	run_id TEXT NOT NULL, 
	seq BIGINT NOT NULL, 
	request_id TEXT NOT NULL, 
	external_id TEXT, 
	response_id TEXT, 
	http_request_id TEXT, 
	prompt_group TEXT NOT NULL, 
	tenant TEXT NOT NULL, 
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
	cost_usd TEXT, 
	preemptions INTEGER NOT NULL, 
	steps BIGINT NOT NULL, 
	started_at TEXT NOT NULL, 
	finished_at TEXT NOT NULL, 
	queue_ms FLOAT, 
	ttft_ms FLOAT, 
	tpot_ms FLOAT, 
	e2e_ms FLOAT, 
	PRIMARY KEY (run_id, seq)
);
INSERT INTO "requests" VALUES('run',1,'chatcmpl-1-internal','chatcmpl-1','chatcmpl-1','cost-1','chatcmpl-1-internal','search','m',NULL,'/v1/chat/completions','length_capped','tokens',10,2,5,8,4,300,100,200,7,'0.000000007',0,6,'2027-01-15T08:00:00.000000Z','2027-01-15T08:00:01.000000Z',1.0,2.0,3.0,4.0);
CREATE TABLE runs (
	run_id TEXT NOT NULL, 
	engine_index INTEGER NOT NULL, 
	model TEXT NOT NULL, 
	gpus INTEGER NOT NULL, 
	method TEXT NOT NULL, 
	vllm_version TEXT NOT NULL, 
	meter_version TEXT NOT NULL, 
	native BOOLEAN NOT NULL, 
	started_at TEXT NOT NULL, 
	price_id TEXT, 
	PRIMARY KEY (run_id)
);
INSERT INTO "runs" VALUES('run',0,'m',1,'tokens','0.32.0','0.1.0',1,'2027-01-15T08:00:00.000000Z','settings:2.5');
CREATE TABLE schema_version (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "schema_version" VALUES(1);
CREATE TABLE snapshots (
	run_id TEXT NOT NULL, 
	number BIGINT NOT NULL, 
	taken_at TEXT NOT NULL, 
	wall_ns BIGINT NOT NULL, 
	requests_ns BIGINT NOT NULL, 
	in_flight_ns BIGINT NOT NULL, 
	idle_ns BIGINT NOT NULL, 
	sleep_ns BIGINT NOT NULL, 
	startup_ns BIGINT NOT NULL, 
	tail_ns BIGINT NOT NULL, 
	dummy_ns BIGINT NOT NULL, 
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
	PRIMARY KEY (run_id)
);
INSERT INTO "snapshots" VALUES('run',1,'2027-01-15T08:00:02.000000Z',1350,300,0,1000,0,0,0,0,50,0,1,300,0,0,0.0,6,300,3,0,'on');
CREATE TABLE usage_pieces (
	run_id TEXT NOT NULL, 
	seq BIGINT NOT NULL, 
	hour INTEGER NOT NULL, 
	tenant TEXT NOT NULL, 
	prefill_ns BIGINT NOT NULL, 
	decode_ns BIGINT NOT NULL, 
	prefill_tokens BIGINT NOT NULL, 
	decode_tokens BIGINT NOT NULL, 
	PRIMARY KEY (run_id, seq, hour)
)
 WITHOUT ROWID

;
INSERT INTO "usage_pieces" VALUES('run',1,500000,'search',100,200,8,4);
CREATE INDEX ix_http_requests_finished ON http_requests (finished_at, http_request_id);
CREATE INDEX ix_http_requests_x_request_id ON http_requests (x_request_id);
CREATE INDEX ix_http_requests_response_id ON http_requests (response_id);
CREATE INDEX ix_http_requests_tenant ON http_requests (tenant, finished_at, http_request_id);
CREATE INDEX ix_requests_http ON requests (http_request_id, prompt_group, prompt_tokens, cached_tokens, output_tokens);
CREATE INDEX ix_requests_external_id ON requests (external_id);
CREATE INDEX ix_requests_finished_at ON requests (finished_at);
CREATE INDEX ix_requests_request_id ON requests (request_id);
CREATE INDEX ix_requests_response_id ON requests (response_id);
CREATE INDEX ix_usage_pieces_hour ON usage_pieces (hour, tenant);
COMMIT;
