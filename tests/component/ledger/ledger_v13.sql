BEGIN TRANSACTION;
CREATE TABLE bill_sums (
	run_id TEXT NOT NULL, 
	bills BIGINT NOT NULL, 
	last_seq BIGINT NOT NULL, 
	gpu_time_ns BIGINT NOT NULL, 
	digest BIGINT NOT NULL, 
	method TEXT NOT NULL, 
	started_at TEXT NOT NULL, 
	finished_at TEXT NOT NULL, 
	PRIMARY KEY (run_id)
);
INSERT INTO "bill_sums" VALUES('run',5,5,1500,4373041696834674036,'tokens','2027-01-15T08:00:00.000001Z','2027-01-15T08:00:00.005000Z');
INSERT INTO "bill_sums" VALUES('0123456789abcdef0123456789abcdef',3,3,243000000,3606766846591167960,'tokens','2026-11-29T21:26:18.673604Z','2026-11-29T21:26:19.373686Z');
CREATE TABLE billed_hours (
	resource TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	hour INTEGER NOT NULL, 
	nanousd BIGINT NOT NULL, 
	covered_ns BIGINT NOT NULL, 
	unobserved_ns BIGINT NOT NULL, 
	resets INTEGER NOT NULL, 
	basis TEXT NOT NULL, 
	PRIMARY KEY (resource, kind, hour)
);
CREATE TABLE billing_snapshots (
	resource TEXT NOT NULL, 
	taken_at TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	cumulative_nanousd BIGINT, 
	nanousd_per_hour BIGINT, 
	source TEXT NOT NULL, 
	imported_at TEXT NOT NULL, 
	PRIMARY KEY (resource, taken_at)
);
CREATE TABLE cost_models (
	run_id TEXT NOT NULL, 
	version INTEGER NOT NULL, 
	taken_at TEXT NOT NULL, 
	form TEXT NOT NULL, 
	planes TEXT NOT NULL, 
	steps BIGINT NOT NULL, 
	error_two_planes FLOAT NOT NULL, 
	error_one_plane FLOAT NOT NULL, 
	explained FLOAT NOT NULL, 
	PRIMARY KEY (run_id, version)
);
INSERT INTO "cost_models" VALUES('run',3,'2027-01-15T08:01:00.000000Z','one plane','[[0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [2000000.0, 100000.0, 50000.0, 5.0, 0.0]]',128,0.05,0.04,0.93);
CREATE TABLE dropped_bills (
	run_id TEXT NOT NULL, 
	bills BIGINT NOT NULL, 
	last_seq BIGINT NOT NULL, 
	gpu_time_ns BIGINT NOT NULL, 
	digest BIGINT NOT NULL, 
	method TEXT NOT NULL, 
	started_at TEXT NOT NULL, 
	finished_at TEXT NOT NULL, 
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
	requests BIGINT NOT NULL, 
	prompt_tokens BIGINT NOT NULL, 
	cached_tokens BIGINT NOT NULL, 
	output_tokens BIGINT NOT NULL, 
	arrivals BIGINT NOT NULL, 
	energy_mj BIGINT NOT NULL, 
	energies BIGINT NOT NULL, 
	PRIMARY KEY (hour, group_id)
)
 WITHOUT ROWID

;
CREATE TABLE dropped_latencies (
	hour INTEGER NOT NULL, 
	measure TEXT NOT NULL, 
	about_us BIGINT NOT NULL, 
	run_id TEXT NOT NULL, 
	exchanges BIGINT NOT NULL, 
	sum_us BIGINT NOT NULL, 
	PRIMARY KEY (hour, measure, about_us, run_id)
)
 WITHOUT ROWID

;
CREATE TABLE dropped_unknown_energy (
	hour INTEGER NOT NULL, 
	later_hour INTEGER NOT NULL, 
	group_id BIGINT NOT NULL, 
	bills BIGINT NOT NULL, 
	PRIMARY KEY (hour, later_hour, group_id)
)
 WITHOUT ROWID

;
CREATE TABLE energy_hours (
	run_id TEXT NOT NULL, 
	hour INTEGER NOT NULL, 
	number BIGINT NOT NULL, 
	requests_mj BIGINT NOT NULL, 
	in_flight_mj BIGINT NOT NULL, 
	idle_mj BIGINT NOT NULL, 
	sleep_mj BIGINT NOT NULL, 
	tail_mj BIGINT NOT NULL, 
	dummy_mj BIGINT NOT NULL, 
	host_mj BIGINT NOT NULL, 
	lost_mj BIGINT NOT NULL, 
	unattributed_mj BIGINT NOT NULL, 
	PRIMARY KEY (run_id, hour)
);
INSERT INTO "energy_hours" VALUES('run',500000,1,7,0,0,0,0,0,0,0,0);
CREATE TABLE energy_sums (
	run_id TEXT NOT NULL, 
	energy_mj BIGINT NOT NULL, 
	PRIMARY KEY (run_id)
);
INSERT INTO "energy_sums" VALUES('run',7);
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
INSERT INTO "engine_hours" VALUES('run',500000,1,1200,40,1000,0,0,3,0,0,0);
CREATE TABLE http_requests (
	http_request_id TEXT NOT NULL, 
	response_id TEXT, 
	x_request_id TEXT, 
	tenant TEXT NOT NULL, 
	tenant_rule TEXT NOT NULL, 
	tenant_above TEXT, 
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
INSERT INTO "http_requests" VALUES('h1','resp-h1','x-h1','alice','none',NULL,'m','/v1/completions',200,0,NULL,NULL,NULL,300,7,'0.000000007','2027-01-15T08:00:00.000000Z','2027-01-15T08:00:00.000000Z');
INSERT INTO "http_requests" VALUES('h2','resp-h2','x-h2','alice','none',NULL,'m','/v1/completions',200,0,NULL,NULL,NULL,300,7,'0.000000007','2027-01-15T08:00:00.000000Z','2027-01-15T08:00:00.000000Z');
INSERT INTO "http_requests" VALUES('h3','resp-h3','x-h3','alice','none',NULL,'m','/v1/completions',200,0,NULL,NULL,NULL,300,7,'0.000000007','2027-01-15T08:00:00.000000Z','2027-01-15T08:00:00.000000Z');
INSERT INTO "http_requests" VALUES('cost-01a22933a1edfb282217083b14faea11','cmpl-3e5b6c0bfea0edd7',NULL,'tenant-00','api_key',NULL,'model','/v1/completions',200,1,128,0,128,81000000,56250,'0.000056250','2026-11-29T21:26:18.673604Z','2026-11-29T21:26:19.373604Z');
INSERT INTO "http_requests" VALUES('cost-01a22933a1ed282744a89d6dd52a99cf','cmpl-758ea4c17b2119e6',NULL,'tenant-01','api_key',NULL,'model','/v1/completions',200,1,128,0,128,81000000,56250,'0.000056250','2026-11-29T21:26:18.673668Z','2026-11-29T21:26:19.373668Z');
INSERT INTO "http_requests" VALUES('cost-01a22933a1ede46f04ec401e31122aa7','cmpl-46f33ffe70fdec80',NULL,'tenant-02','api_key',NULL,'model','/v1/completions',200,1,128,0,128,81000000,56250,'0.000056250','2026-11-29T21:26:18.673686Z','2026-11-29T21:26:19.373686Z');
CREATE TABLE invoice_lines (
	resource TEXT NOT NULL, 
	begins_at TEXT NOT NULL, 
	ends_at TEXT NOT NULL, 
	invoice TEXT NOT NULL, 
	item TEXT NOT NULL, 
	charge_class TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	nanousd BIGINT NOT NULL, 
	source TEXT NOT NULL, 
	imported_at TEXT NOT NULL, 
	PRIMARY KEY (resource, begins_at, ends_at, invoice, item, charge_class)
);
CREATE TABLE journal_losses (
	journal_id TEXT NOT NULL, 
	after_number BIGINT NOT NULL, 
	records BIGINT NOT NULL, 
	reason TEXT NOT NULL, 
	noticed_at TEXT NOT NULL, 
	PRIMARY KEY (journal_id, after_number)
);
CREATE TABLE journals (
	journal_id TEXT NOT NULL, 
	segment BIGINT NOT NULL, 
	offset_bytes BIGINT NOT NULL, 
	number BIGINT NOT NULL, 
	applied_at TEXT NOT NULL, 
	PRIMARY KEY (journal_id)
);
CREATE TABLE live_usage (
	run_id TEXT NOT NULL, 
	number BIGINT NOT NULL, 
	taken_at TEXT NOT NULL, 
	live_ns BIGINT NOT NULL, 
	step_ns BIGINT NOT NULL, 
	requests TEXT NOT NULL, 
	PRIMARY KEY (run_id)
);
INSERT INTO "live_usage" VALUES('run',1,'2027-01-15T08:01:00.000000Z',0,40,'{"fields":["prefill_ns","decode_ns","prefill_tokens","decode_tokens","marginal_ns","recomputed_ns","recomputed_tokens","rejected_ns","rejected_tokens","cut_ns","cut_tokens","kv_block_ns","step_ns","steps","batch"],"requests":[]}');
CREATE TABLE open_requests (
	request_id TEXT NOT NULL, 
	started_at TEXT NOT NULL, 
	external_id TEXT, 
	response_id TEXT, 
	http_request_id TEXT, 
	x_request_id TEXT, 
	prompt_group TEXT NOT NULL, 
	tenant TEXT NOT NULL, 
	tenant_rule TEXT NOT NULL, 
	tenant_parent TEXT, 
	tags TEXT, 
	tenant_above TEXT, 
	model TEXT, 
	lora TEXT, 
	route TEXT, 
	PRIMARY KEY (request_id, started_at)
);
INSERT INTO "open_requests" VALUES('chatcmpl-00112233445566778899aabbccddeeff-0-abcdef01','2027-01-15T08:00:00.123456Z','ext ü',NULL,'cost-00112233445566778899aabbccddeeff','req-1','g','alice','api_key',NULL,NULL,NULL,'model',NULL,'/v1/completions');
CREATE TABLE prices (
	price_id TEXT NOT NULL, 
	usd_per_gpu_hour TEXT NOT NULL, 
	source TEXT NOT NULL, 
	effective_from TEXT NOT NULL, 
	PRIMARY KEY (price_id)
);
CREATE TABLE request_energy (
	run_id TEXT NOT NULL, 
	seq BIGINT NOT NULL, 
	hour INTEGER NOT NULL, 
	energy_mj BIGINT, 
	reason TEXT, 
	PRIMARY KEY (run_id, seq, hour)
)
 WITHOUT ROWID

;
INSERT INTO "request_energy" VALUES('run',1,500000,7,NULL);
INSERT INTO "request_energy" VALUES('run',2,500000,NULL,'no_device');
CREATE TABLE requests (
	run_id TEXT NOT NULL, 
	seq BIGINT NOT NULL, 
	request_id TEXT NOT NULL, 
	external_id TEXT, 
	response_id TEXT, 
	http_request_id TEXT, 
	prompt_group TEXT NOT NULL, 
	tenant TEXT NOT NULL, 
	tenant_rule TEXT NOT NULL, 
	tenant_parent TEXT, 
	tags TEXT, 
	tenant_above TEXT, 
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
	started_at TEXT NOT NULL, 
	finished_at TEXT NOT NULL, 
	queue_ms FLOAT, 
	ttft_ms FLOAT, 
	tpot_ms FLOAT, 
	e2e_ms FLOAT, 
	PRIMARY KEY (run_id, seq)
);
INSERT INTO "requests" VALUES('run',1,'internal-1','external-1','resp-h1','h1','group-1','alice','none',NULL,NULL,NULL,'m',NULL,'/v1/completions','stop','tokens',10,2,5,8,5,300,100,200,7,'0.000000007',0,NULL,0,0,0,0,0,0,0,0,0,0,6,12,1,3,'2027-01-15T08:00:00.000001Z','2027-01-15T08:00:00.001000Z',1.0,2.0,3.0,4.0);
INSERT INTO "requests" VALUES('run',2,'internal-2','external-2','resp-h2','h2','group-2','o''dd "ñ\','api_key','above','{"a":"{''x'': \"\\n\"}"}','
above
','m',NULL,'/v1/completions','stop','tokens',10,2,5,8,5,300,100,200,7,'0.000000007',0,NULL,0,0,0,0,0,0,0,0,0,0,6,12,1,3,'2027-01-15T08:00:00.000002Z','2027-01-15T08:00:00.002000Z',2.0,4.0,3.0,8.0);
INSERT INTO "requests" VALUES('run',3,'internal-3','external-3','resp-h2','h2','group-3','alice','none',NULL,NULL,NULL,'m',NULL,'/v1/completions','stop','tokens',10,2,5,8,5,300,100,200,7,'0.000000007',0,NULL,0,0,0,0,0,0,0,0,0,0,6,12,1,3,'2027-01-15T08:00:00.000003Z','2027-01-15T08:00:00.003000Z',3.0,6.0,3.0,12.0);
INSERT INTO "requests" VALUES('run',4,'internal-4','external-4',NULL,NULL,'group-4','alice','none',NULL,NULL,NULL,'m',NULL,'/v1/completions','stop','tokens',10,2,5,8,5,300,100,200,7,'0.000000007',0,NULL,0,0,0,0,0,0,0,0,0,0,6,12,1,3,'2027-01-15T08:00:00.000004Z','2027-01-15T08:00:00.004000Z',4.0,8.0,3.0,16.0);
INSERT INTO "requests" VALUES('0123456789abcdef0123456789abcdef',1,'cmpl-3e5b6c0bfea0edd7-0-9926851f','cmpl-3e5b6c0bfea0edd7-0','cmpl-3e5b6c0bfea0edd7','cost-01a22933a1edfb282217083b14faea11','cmpl-3e5b6c0bfea0edd7-0-9926851f','tenant-00','api_key',NULL,NULL,NULL,'model',NULL,'/v1/completions','length_capped','tokens',128,0,128,128,127,81000000,1000000,80000000,56250,'0.000056250',60000000,50000,0,0,0,0,0,0,5600,900000000,0,0,128,1280,3,4,'2026-11-29T21:26:18.673604Z','2026-11-29T21:26:19.373604Z',9.8108113347552716732e-01,2.96216226695105433464e+01,5.96216226695105433464e+00,7.96216226695105433464e+02);
INSERT INTO "requests" VALUES('0123456789abcdef0123456789abcdef',2,'cmpl-758ea4c17b2119e6-0-8df8383b','cmpl-758ea4c17b2119e6-0','cmpl-758ea4c17b2119e6','cost-01a22933a1ed282744a89d6dd52a99cf','cmpl-758ea4c17b2119e6-0-8df8383b','tenant-01','api_key',NULL,NULL,NULL,'model',NULL,'/v1/completions','length_capped','tokens',128,0,128,128,127,81000000,1000000,80000000,56250,'0.000056250',60000000,50000,0,0,0,0,0,0,5600,900000000,0,0,128,1280,3,4,'2026-11-29T21:26:18.673668Z','2026-11-29T21:26:19.373668Z',1.56849185004830360412e-01,1.31369837000966072082e+01,4.31369837000966072082e+00,6.31369837000966072082e+02);
INSERT INTO "requests" VALUES('0123456789abcdef0123456789abcdef',3,'cmpl-46f33ffe70fdec80-0-0ac27440','cmpl-46f33ffe70fdec80-0','cmpl-46f33ffe70fdec80','cost-01a22933a1ede46f04ec401e31122aa7','cmpl-46f33ffe70fdec80-0-0ac27440','tenant-02','api_key',NULL,NULL,NULL,'model',NULL,'/v1/completions','length_capped','tokens',128,0,128,128,127,81000000,1000000,80000000,56250,'0.000056250',60000000,50000,0,0,0,0,0,0,5600,900000000,0,0,128,1280,3,4,'2026-11-29T21:26:18.673686Z','2026-11-29T21:26:19.373686Z',8.92319018952548503875e-01,2.78463803790509700775e+01,5.78463803790509700775e+00,7.78463803790509700775e+02);
INSERT INTO "requests" VALUES('run',5,'internal-5','external-5','resp-h5','h5','group-5','alice','none',NULL,NULL,NULL,'m',NULL,'/v1/completions','stop','tokens',10,2,5,8,5,300,100,200,7,'0.000000007',0,NULL,0,0,0,0,0,0,0,0,0,0,6,12,1,3,'2027-01-15T08:00:00.000005Z','2027-01-15T08:00:00.005000Z',5.0,10.0,3.0,20.0);
CREATE TABLE rollup_arrivals (
	hour INTEGER NOT NULL, 
	exchanges BIGINT NOT NULL, 
	PRIMARY KEY (hour)
);
INSERT INTO "rollup_arrivals" VALUES(498885,3);
INSERT INTO "rollup_arrivals" VALUES(500000,4);
CREATE TABLE rollup_days (
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
	requests BIGINT NOT NULL, 
	prompt_tokens BIGINT NOT NULL, 
	cached_tokens BIGINT NOT NULL, 
	output_tokens BIGINT NOT NULL, 
	PRIMARY KEY (day, group_id)
)
 WITHOUT ROWID

;
INSERT INTO "rollup_days" VALUES(20786,2117894811182738154,NULL,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,128,0,128);
INSERT INTO "rollup_days" VALUES(20786,5915820724412134388,NULL,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,128,0,128);
INSERT INTO "rollup_days" VALUES(20786,6128625105152493189,NULL,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,128,0,128);
INSERT INTO "rollup_days" VALUES(20833,1883617547268989816,499999,400,800,32,20,0,0,0,0,0,0,0,0,0,0,1,30,6,15);
INSERT INTO "rollup_days" VALUES(20833,2117894811182738154,500000,1000000,80000000,128,127,60000000,0,0,0,0,0,0,5600,900000000,0,0,0,0,0);
INSERT INTO "rollup_days" VALUES(20833,5915820724412134388,500000,1000000,80000000,128,127,60000000,0,0,0,0,0,0,5600,900000000,0,0,0,0,0);
INSERT INTO "rollup_days" VALUES(20833,6097579224822674746,NULL,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,20,4,10);
INSERT INTO "rollup_days" VALUES(20833,6128625105152493189,500000,1000000,80000000,128,127,60000000,0,0,0,0,0,0,5600,900000000,0,0,0,0,0);
INSERT INTO "rollup_days" VALUES(20833,6287031702484266160,500000,100,200,8,5,0,0,0,0,0,0,0,0,0,0,0,0,0,0);
CREATE TABLE rollup_groups (
	group_id BIGINT NOT NULL, 
	run_id TEXT NOT NULL, 
	tenant TEXT NOT NULL, 
	tenant_rule TEXT NOT NULL, 
	tenant_parent TEXT, 
	tags TEXT, 
	tenant_above TEXT, 
	model TEXT, 
	lora TEXT, 
	route TEXT, 
	engine_status TEXT NOT NULL, 
	PRIMARY KEY (group_id)
);
INSERT INTO "rollup_groups" VALUES(1883617547268989816,'run','alice','none',NULL,NULL,NULL,'m',NULL,'/v1/completions','stop');
INSERT INTO "rollup_groups" VALUES(6097579224822674746,'run','alice','none','above','{"a":"{''x'': \"\\n\"}"}',NULL,'m',NULL,'/v1/completions','stop');
INSERT INTO "rollup_groups" VALUES(6287031702484266160,'run','o''dd "ñ\','api_key','above','{"a":"{''x'': \"\\n\"}"}','
above
','m',NULL,'/v1/completions','stop');
INSERT INTO "rollup_groups" VALUES(2117894811182738154,'0123456789abcdef0123456789abcdef','tenant-00','api_key',NULL,NULL,NULL,'model',NULL,'/v1/completions','length_capped');
INSERT INTO "rollup_groups" VALUES(5915820724412134388,'0123456789abcdef0123456789abcdef','tenant-01','api_key',NULL,NULL,NULL,'model',NULL,'/v1/completions','length_capped');
INSERT INTO "rollup_groups" VALUES(6128625105152493189,'0123456789abcdef0123456789abcdef','tenant-02','api_key',NULL,NULL,NULL,'model',NULL,'/v1/completions','length_capped');
CREATE TABLE rollup_hours (
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
	requests BIGINT NOT NULL, 
	prompt_tokens BIGINT NOT NULL, 
	cached_tokens BIGINT NOT NULL, 
	output_tokens BIGINT NOT NULL, 
	PRIMARY KEY (hour, group_id)
)
 WITHOUT ROWID

;
INSERT INTO "rollup_hours" VALUES(498885,2117894811182738154,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,128,0,128);
INSERT INTO "rollup_hours" VALUES(498885,5915820724412134388,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,128,0,128);
INSERT INTO "rollup_hours" VALUES(498885,6128625105152493189,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,128,0,128);
INSERT INTO "rollup_hours" VALUES(499999,1883617547268989816,60,120,5,3,0,0,0,0,0,0,0,0,0,0,0,0,0,0);
INSERT INTO "rollup_hours" VALUES(500000,1883617547268989816,340,680,27,17,0,0,0,0,0,0,0,0,0,0,1,30,6,15);
INSERT INTO "rollup_hours" VALUES(500000,2117894811182738154,1000000,80000000,128,127,60000000,0,0,0,0,0,0,5600,900000000,0,0,0,0,0);
INSERT INTO "rollup_hours" VALUES(500000,5915820724412134388,1000000,80000000,128,127,60000000,0,0,0,0,0,0,5600,900000000,0,0,0,0,0);
INSERT INTO "rollup_hours" VALUES(500000,6097579224822674746,0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,20,4,10);
INSERT INTO "rollup_hours" VALUES(500000,6128625105152493189,1000000,80000000,128,127,60000000,0,0,0,0,0,0,5600,900000000,0,0,0,0,0);
INSERT INTO "rollup_hours" VALUES(500000,6287031702484266160,100,200,8,5,0,0,0,0,0,0,0,0,0,0,0,0,0,0);
CREATE TABLE rollup_latencies (
	hour INTEGER NOT NULL, 
	measure TEXT NOT NULL, 
	about_us BIGINT NOT NULL, 
	exchanges BIGINT NOT NULL, 
	sum_us BIGINT NOT NULL, 
	PRIMARY KEY (hour, measure, about_us)
)
 WITHOUT ROWID

;
INSERT INTO "rollup_latencies" VALUES(498885,'e2e',628063,1,631370);
INSERT INTO "rollup_latencies" VALUES(498885,'e2e',782620,1,778464);
INSERT INTO "rollup_latencies" VALUES(498885,'e2e',798430,1,796216);
INSERT INTO "rollup_latencies" VALUES(498885,'tpot',4317,1,4314);
INSERT INTO "rollup_latencies" VALUES(498885,'tpot',5827,1,5785);
INSERT INTO "rollup_latencies" VALUES(498885,'tpot',5945,1,5962);
INSERT INTO "rollup_latencies" VALUES(498885,'ttft',13230,1,13137);
INSERT INTO "rollup_latencies" VALUES(498885,'ttft',27731,1,27846);
INSERT INTO "rollup_latencies" VALUES(498885,'ttft',29445,1,29622);
INSERT INTO "rollup_latencies" VALUES(500000,'e2e',3985,1,4000);
INSERT INTO "rollup_latencies" VALUES(500000,'e2e',11971,1,12000);
INSERT INTO "rollup_latencies" VALUES(500000,'e2e',16160,1,16000);
INSERT INTO "rollup_latencies" VALUES(500000,'e2e',20136,1,20000);
INSERT INTO "rollup_latencies" VALUES(500000,'tpot',3012,4,12000);
INSERT INTO "rollup_latencies" VALUES(500000,'ttft',2019,1,2000);
INSERT INTO "rollup_latencies" VALUES(500000,'ttft',3985,1,4000);
INSERT INTO "rollup_latencies" VALUES(500000,'ttft',8024,1,8000);
INSERT INTO "rollup_latencies" VALUES(500000,'ttft',9999,1,10000);
CREATE TABLE row_cutoffs (
	kept_from_hour INTEGER NOT NULL, 
	decided_at TEXT NOT NULL, 
	PRIMARY KEY (kept_from_hour)
);
CREATE TABLE runs (
	run_id TEXT NOT NULL, 
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
	started_at TEXT NOT NULL, 
	price_id TEXT, 
	devices TEXT, 
	labels TEXT, 
	PRIMARY KEY (run_id)
);
INSERT INTO "runs" VALUES('run',0,'m',1,'a GPU','tp=1 pp=1 dp=1',1000,16,'node-1','bfloat16','tokens','0.32.0','0.1.0',1,'2027-01-15T08:00:00.000000Z',NULL,NULL,'{"pool": "spot"}');
CREATE TABLE saturation_points (
	point_id TEXT NOT NULL, 
	measured_at TEXT NOT NULL, 
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
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);
INSERT INTO "schema_version" VALUES(13);
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
	prior TEXT NOT NULL, 
	energy_mj BIGINT, 
	requests_mj BIGINT, 
	in_flight_mj BIGINT, 
	idle_mj BIGINT, 
	sleep_mj BIGINT, 
	tail_mj BIGINT, 
	dummy_mj BIGINT, 
	host_mj BIGINT, 
	lost_mj BIGINT, 
	unattributed_mj BIGINT, 
	energy_unknown_ns BIGINT, 
	energy_reason TEXT, 
	PRIMARY KEY (run_id)
);
INSERT INTO "snapshots" VALUES('run',1,'2027-01-15T08:01:00.000000Z',2243,1200,40,1000,0,0,3,0,0,0,4,1200,1,0,0.5,9,1000,10,0,'on','tokens',7,7,0,0,0,0,0,0,0,0,0,NULL);
CREATE TABLE usage_pieces (
	run_id TEXT NOT NULL, 
	seq BIGINT NOT NULL, 
	hour INTEGER NOT NULL, 
	tenant TEXT NOT NULL, 
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
	PRIMARY KEY (run_id, seq, hour)
)
 WITHOUT ROWID

;
INSERT INTO "usage_pieces" VALUES('0123456789abcdef0123456789abcdef',1,500000,'tenant-00',1000000,80000000,128,127,60000000,0,0,0,0,0,0,5600,900000000,0);
INSERT INTO "usage_pieces" VALUES('0123456789abcdef0123456789abcdef',2,500000,'tenant-01',1000000,80000000,128,127,60000000,0,0,0,0,0,0,5600,900000000,0);
INSERT INTO "usage_pieces" VALUES('0123456789abcdef0123456789abcdef',3,500000,'tenant-02',1000000,80000000,128,127,60000000,0,0,0,0,0,0,5600,900000000,0);
INSERT INTO "usage_pieces" VALUES('run',1,500000,'alice',100,200,8,5,0,0,0,0,0,0,0,0,0,0);
INSERT INTO "usage_pieces" VALUES('run',2,500000,'o''dd "ñ\',100,200,8,5,0,0,0,0,0,0,0,0,0,0);
INSERT INTO "usage_pieces" VALUES('run',3,500000,'alice',100,200,8,5,0,0,0,0,0,0,0,0,0,0);
INSERT INTO "usage_pieces" VALUES('run',4,500000,'alice',100,200,8,5,0,0,0,0,0,0,0,0,0,0);
INSERT INTO "usage_pieces" VALUES('run',5,499999,'alice',60,120,5,3,0,0,0,0,0,0,0,0,0,0);
INSERT INTO "usage_pieces" VALUES('run',5,500000,'alice',40,80,3,2,0,0,0,0,0,0,0,0,0,0);
CREATE INDEX ix_rollup_groups_tenant ON rollup_groups (tenant, tenant_above);
CREATE INDEX ix_open_requests_response_id ON open_requests (response_id);
CREATE INDEX ix_open_requests_external_id ON open_requests (external_id);
CREATE INDEX ix_open_requests_http_request_id ON open_requests (http_request_id);
CREATE INDEX ix_open_requests_x_request_id ON open_requests (x_request_id);
CREATE INDEX ix_http_requests_x_request_id ON http_requests (x_request_id) WHERE x_request_id IS NOT NULL;
CREATE INDEX ix_http_requests_finished ON http_requests (finished_at);
CREATE INDEX ix_http_requests_response_id ON http_requests (response_id) WHERE response_id IS NOT NULL;
CREATE INDEX ix_http_requests_tenant ON http_requests (tenant, finished_at);
CREATE INDEX ix_requests_request_id ON requests (request_id);
CREATE INDEX ix_requests_response_id ON requests (response_id) WHERE response_id IS NOT NULL;
CREATE INDEX ix_requests_external_id ON requests (external_id) WHERE external_id IS NOT NULL;
CREATE INDEX ix_requests_http ON requests (http_request_id);
CREATE INDEX ix_requests_finished_at ON requests (finished_at);
CREATE INDEX ix_usage_pieces_hour ON usage_pieces (hour, tenant);
CREATE INDEX ix_billed_hours_hour ON billed_hours (hour);
COMMIT;
