"""Settings: what may stand where, which source wins, and the one line that says what is wrong."""

import hashlib
import json
from decimal import Decimal

import pytest
from pydantic import ValidationError

from vllm_cost_meter.config.engine import EngineSettings, load_engine_settings
from vllm_cost_meter.config.loading import OTHER_NAMES, load_settings
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.errors import SettingError
from vllm_cost_meter.tenants.rules import ApiKeyRule, Believed, HeaderRule

HASH_A = hashlib.sha256(b"sk-a").hexdigest()
HASH_B = hashlib.sha256(b"sk-b").hexdigest()
SECRET = "sk-do-not-print-this"


@pytest.fixture
def toml(tmp_path):
    def write(text: str | bytes) -> dict[str, str]:
        path = tmp_path / "meter.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return {"COST_METER_CONFIG": str(path)}

    return write


def env(**values: str) -> dict[str, str]:
    return {f"COST_METER_{name.upper()}": value for name, value in values.items()}


def complaint(environ: dict[str, str]) -> str:
    with pytest.raises(SettingError) as caught:
        load_settings(environ)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert SECRET not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


def test_an_empty_environment_gives_the_defaults():
    settings = load_settings({})
    assert settings == Settings()
    assert settings.gpu_hour_usd is None
    assert settings.ledger is None
    assert (settings.host, settings.port) == ("127.0.0.1", 9477)
    assert (settings.method, settings.reply) == ("shapley", "all")
    assert (settings.bill_timeout_ms, settings.snapshot_interval_s) == (250, 1.0)
    assert settings.resolver.rules == (ApiKeyRule({}),)


def test_other_variables_do_not_matter():
    others = dict.fromkeys(OTHER_NAMES, "1") | {"PATH": "/bin", "VLLM_PLUGINS": "cost_meter"}
    assert load_settings(others) == Settings()


def test_the_real_environment_is_read_only_when_asked(monkeypatch):
    monkeypatch.setenv("COST_METER_PORT", "1234")
    assert Settings().port == 9477
    assert load_settings({}).port == 9477
    assert load_settings().port == 1234


def test_the_environment_sets_everything():
    settings = load_settings(
        env(
            gpu_hour_usd="2.49",
            ledger="sqlite:////tmp/x.db",
            host="0.0.0.0",
            port="0",
            admin_token="s3cret-of-the-operator",
            method="equal",
            reply="headers",
            bill_timeout_ms="10000",
            snapshot_interval_s="0.5",
            gateway_secret=SECRET,
            tenant_rules=json.dumps([{"rule": "header", "name": "X-Tenant"}, {"rule": "api_key"}]),
            tenants=json.dumps([{"name": "a", "api_key_sha256": [HASH_A.upper()]}]),
        )
    )
    assert settings.gpu_hour_usd == Decimal("2.49")
    assert settings.ledger == "sqlite:////tmp/x.db"
    assert (settings.host, settings.port) == ("0.0.0.0", 0)
    assert settings.admin_token.get_secret_value() == "s3cret-of-the-operator"
    assert (settings.method, settings.reply) == ("equal", "headers")
    assert (settings.bill_timeout_ms, settings.snapshot_interval_s) == (10_000, 0.5)
    proof = hashlib.sha256(SECRET.encode()).hexdigest()
    assert settings.resolver.rules == (
        HeaderRule(Believed("x-tenant", proof)),
        ApiKeyRule({HASH_A: "a"}),
    )


def test_the_file_sets_everything_and_the_environment_beats_it(toml):
    environ = toml(
        f"""
        gpu_hour_usd = 2.5
        port = "off"
        reply = "none"
        snapshot_interval_s = 2
        [[tenants]]
        name = "a"
        api_key_sha256 = ["{HASH_A}"]
        [[tenants]]
        name = "b"
        api_key_sha256 = ["{HASH_B}"]
        reply = "all"
        """
    )
    settings = load_settings(environ | env(reply="headers"))
    assert settings.config == environ["COST_METER_CONFIG"]
    assert settings.gpu_hour_usd == Decimal("2.5")
    assert settings.port is None
    assert settings.snapshot_interval_s == 2.0
    assert settings.resolver.rules == (ApiKeyRule({HASH_A: "a", HASH_B: "b"}),)
    assert settings.reply_for("a") == settings.reply_for("unknown") == "headers"
    assert settings.reply_for("b") == "all"


def test_a_path_passed_beats_the_one_in_the_environment(toml, tmp_path):
    toml("port = 1")
    other = tmp_path / "other.toml"
    other.write_text("port = 2")
    assert load_settings(toml("port = 1"), other).port == 2


def test_settings_never_change():
    with pytest.raises(ValidationError):
        load_settings({}).port = 1


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("gpu_hour_usd", "2,5", "decimal number"),
        ("gpu_hour_usd", "-1", "decimal number"),
        ("gpu_hour_usd", "nan", "decimal number"),
        ("gpu_hour_usd", "1e99999999", "decimal number"),
        ("gpu_hour_usd", "1e-99999999", "decimal number"),
        ("gpu_hour_usd", "0e-99999999", "decimal number"),
        ("gpu_hour_usd", "", "decimal number"),
        ("host", "", "host name or an IP address"),
        ("host", "a b", "host name or an IP address"),
        ("port", "-1", "0 to 65535, or off"),
        ("port", "65536", "0 to 65535, or off"),
        ("port", "http", "0 to 65535, or off"),
        ("keep_rows_days", "0", "a whole number from 1 to 36500, or forever"),
        ("keep_rows_days", "never", "a whole number from 1 to 36500, or forever"),
        ("keep_rows_bytes", "20", "a whole number of MB, GB or TB, such as 20GB; at least 100MB"),
        ("keep_rows_bytes", "1.5GB", "a whole number of MB, GB or TB"),
        ("keep_rows_bytes", "99MB", "a whole number of MB, GB or TB"),
        ("port", "", "0 to 65535, or off"),
        ("port", "tcp://10.0.0.1:9477", "Kubernetes"),
        ("method", "shapely", "shapley, tokens or equal"),
        ("preemption_paid_by", "tenant", "victim or operator"),
        ("reply", "ALL", "all, headers or none"),
        ("bill_timeout_ms", "0", "1 to 10000"),
        ("bill_timeout_ms", "10001", "1 to 10000"),
        ("bill_timeout_ms", "2.5", "1 to 10000"),
        ("snapshot_interval_s", "0", "0.05 to 3600"),
        ("snapshot_interval_s", "inf", "0.05 to 3600"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(name, value, expected):
    message = complaint(env(**{name: value}))
    assert message.startswith(f"COST_METER_{name.upper()} (environment): expected ")
    assert expected in message
    assert f"got {value[:60]!r}"[:60] in message


@pytest.mark.parametrize(
    ("line", "start"),
    [
        ("port = true", "port ("),
        ("bill_timeout_ms = true", "bill_timeout_ms ("),
        ("gpu_hour_usd = true", "gpu_hour_usd ("),
        ("gpu_hour_usd = inf", "gpu_hour_usd ("),
        ("host = 5", "host ("),
        ("tenants = 5", "tenants ("),
        ("[port]\nx = 1", "port ("),
        ("[[tenants]]\nname = 5", "tenants[0].name ("),
        ('[[tenants]]\nname = "a"\nreply = "some"', "tenants[0].reply ("),
    ],
)
def test_a_wrong_value_in_the_file_is_named_by_key_and_file(toml, line, start):
    environ = toml(line)
    message = complaint(environ)
    assert message.startswith(start + environ["COST_METER_CONFIG"] + "): expected ")


def test_the_environments_value_is_blamed_when_both_set_it(toml):
    message = complaint(toml("port = 1") | env(port="x"))
    assert message.startswith("COST_METER_PORT (environment)")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("COST_METER_PROT", "perhaps COST_METER_PORT"),
        ("COST_METER_GPU_HOUR_USD_", "perhaps COST_METER_GPU_HOUR_USD"),
        ("COST_METER_port", "perhaps COST_METER_PORT"),
        ("cost_meter_port", "perhaps COST_METER_PORT"),
        ("COST_METER_", "known setting"),
        ("COST_METER_A\nB", "known setting"),
        ("COST_METER_SERVICE_HOST", "Kubernetes"),
        ("COST_METER_PORT_9477_TCP", "Kubernetes"),
    ],
)
def test_an_unknown_name_in_the_environment_is_an_error(name, hint):
    assert hint in complaint({name: SECRET})


@pytest.mark.parametrize(
    ("text", "start", "hint"),
    [
        (f'gpu_hour_uds = "{SECRET}"', "gpu_hour_uds (", "perhaps gpu_hour_usd"),
        (f'"a\\nb" = "{SECRET}"', "a?b (", "a known key"),
        ('config = "x.toml"', "config (", "COST_METER_CONFIG in the environment"),
        (f'[[tenants]]\nname = "a"\napi_key = "{SECRET}"', "tenants[0].api_key (", "one of name"),
        ('[[tenants]]\nnam = "a"', "tenants[0].nam (", "one of name"),
    ],
)
def test_an_unknown_key_in_the_file_is_an_error(toml, text, start, hint):
    message = complaint(toml(text))
    assert message.startswith(start)
    assert hint in message


@pytest.mark.parametrize("text", ["port = ", b"\xff", "port = 1\nport = 2"])
def test_a_file_that_is_no_toml_is_an_error(toml, text):
    message = complaint(toml(text))
    assert message.startswith("COST_METER_CONFIG (environment): expected the path of a readable")


@pytest.mark.parametrize("path", ["", "/does/not/exist.toml", "/tmp", "a\0b"])
def test_a_file_that_cannot_be_read_is_an_error(path):
    assert complaint(env(config=path)).startswith("COST_METER_CONFIG (environment): expected ")


def test_how_long_rows_are_kept_is_a_number_of_days_or_for_ever_and_a_size():
    assert (load_settings({}).keep_rows_days, load_settings({}).keep_rows_bytes) == (90, None)
    assert load_settings(env(keep_rows_days="forever")).keep_rows_days is None
    assert load_settings(env(keep_rows_days="7")).keep_rows_days == 7
    assert load_settings(env(keep_rows_bytes="20GB")).keep_rows_bytes == 20 * 10**9


def test_off_loopback_a_token_is_needed():
    message = complaint(env(host="0.0.0.0"))
    assert message.startswith("COST_METER_ADMIN_TOKEN (environment): expected a token")
    assert "0.0.0.0" in message
    load_settings(env(host="0.0.0.0", admin_token="x" * 16))
    load_settings(env(host="0.0.0.0", port="off"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_loopback_no_token_is_needed(host):
    assert load_settings(env(host=host)).admin_token is None


@pytest.mark.parametrize("host", ["::", "10.0.0.1", "localhost.example.com", "127.0.0.1.nip.io"])
def test_what_only_looks_like_loopback_needs_a_token(host):
    assert "COST_METER_ADMIN_TOKEN" in complaint(env(host=host))


@pytest.mark.parametrize(
    "environ",
    [
        env(admin_token=f"{SECRET} "),
        env(ledger=f"user:{SECRET}@host/db"),
        env(gateway_secret=f"{SECRET} "),
        env(tenants=SECRET),
        env(tenant_rules=SECRET),
        env(tenant_rules=json.dumps([{"rule": "header", "name": "x", "proof_sha256": SECRET}])),
        env(tenant_rules=json.dumps([{"rule": "header", "proof": SECRET}])),
        env(tenants=json.dumps([{"name": "a", "api_key_sha256": [SECRET]}])),
        env(tenants=json.dumps([{"name": "a", "api_key_sha256": SECRET}])),
        env(tenants=json.dumps([{"name": "a", "api_key_sha256": {"x": SECRET}}])),
        env(tenants=json.dumps([SECRET])),
    ],
)
def test_secrets_are_never_shown(environ):
    complaint(environ)


def test_secrets_are_not_in_the_repr():
    tenants = json.dumps([{"name": "a", "api_key_sha256": [HASH_A]}])
    settings = load_settings(
        env(
            admin_token=SECRET,
            gateway_secret=f"{SECRET}-of-the-gateway",
            ledger=f"postgresql://u:{SECRET}@h/d",
            tenants=tenants,
            tenant_rules=json.dumps([{"rule": "header", "name": "x", "proof_sha256": HASH_B}]),
        )
    )
    assert SECRET not in repr(settings)
    assert HASH_A not in repr(settings)
    assert HASH_B not in repr(settings)


def test_a_list_in_the_environment_that_is_no_json_is_named():
    for name in ("tenants", "tenant_rules"):
        message = complaint(env(**{name: "[{"}))
        assert message.startswith(f"COST_METER_{name.upper()} (environment): expected a list of")


def test_text_may_stand_in_for_a_file_that_is_yet_to_be_written(toml):
    environ = toml("port = 1")
    assert load_settings(environ, text="port = 2").port == 2
    with pytest.raises(SettingError, match="meter.toml"):
        load_settings(environ, text="prot = 2")


@pytest.mark.parametrize(
    ("environment", "file"),
    [
        ({}, ""),
        ({"COST_METER_METHOD": "equal"}, ""),
        ({"COST_METER_METHOD": "tokens", "COST_METER_STEP_LOG": "/x/steps"}, ""),
        ({}, 'method = "tokens"\nstep_log = "/y/steps"\nport = 9'),
        ({"COST_METER_METHOD": "equal"}, 'method = "tokens"\nstep_log = "/y/steps"'),
        ({"COST_METER_PREEMPTION_PAID_BY": "operator"}, ""),
        ({"COST_METER_PREEMPTION_PAID_BY": "victim"}, 'preemption_paid_by = "operator"'),
        ({}, 'preemption_paid_by = "operator"'),
        ({"COST_METER_LABELS": "pool=spot, zone=a"}, ""),
        ({"COST_METER_LABELS": "pool=spot"}, 'labels = { pool = "reserved", zone = "a" }'),
        ({}, 'labels = { zone = "Europe, west", pool = "a=b" }'),
    ],
)
def test_an_engine_reads_the_same_settings_without_the_rest(tmp_path, environment, file):
    path = tmp_path / "meter.toml"
    path.write_text(file)
    given = {**environment, "COST_METER_CONFIG": str(path)}
    all_of_them, engine = load_settings(given), load_engine_settings(given)
    assert (engine.method, engine.step_log) == (all_of_them.method, all_of_them.step_log)
    assert engine.labels == all_of_them.labels
    assert engine.preemption_paid_by == all_of_them.preemption_paid_by
    assert load_engine_settings({}) == EngineSettings(load_settings({}).method, None, {})


def test_labels_are_pairs_in_the_environment_and_a_table_in_the_file(toml):
    pairs = load_settings({"COST_METER_LABELS": "zone=a,pool=spot"}).labels
    assert pairs == load_settings(toml('[labels]\npool = "spot"\nzone = "a"')).labels
    assert list(pairs.items()) == [("pool", "spot"), ("zone", "a")]
    assert load_settings({}).labels == {}


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        ("", "the name ''"),
        ("pool", "'' at 'pool'"),
        ("Pool=spot", "the name 'Pool'"),
        ("pool=spot,pool=big", "a name twice"),
        (f"{'n' * 65}=x", f"the name '{'n' * 65}'"),
        (f"pool={'x' * 254}", f"'{'x' * 253}' at 'pool'"),
        (",".join(f"n{n}=x" for n in range(17)), "17 labels"),
    ],
)
def test_labels_that_are_none_stop_the_start_and_no_engine_takes_them(labels, got):
    with pytest.raises(SettingError, match="COST_METER_LABELS.*expected at most 16 of") as caught:
        load_settings({"COST_METER_LABELS": labels})
    assert str(caught.value).endswith(f"got {got}")
    if labels:
        with pytest.raises(SettingError, match="COST_METER_LABELS.*expected at most 16 of"):
            load_engine_settings({"COST_METER_LABELS": labels})


POD = {"POD_NAME": "chat-7f9-x2x", "POD_NAMESPACE": "models", "NODE_NAME": "gpu-3.example"}


def test_an_engine_in_a_pod_has_the_pods_names_as_labels():
    assert load_engine_settings(POD).labels == {
        "namespace": "models", "node": "gpu-3.example", "pod": "chat-7f9-x2x",
    }  # fmt: skip
    assert load_engine_settings({"POD_NAME": "", "NODE_NAME": "gpu-3"}).labels == {"node": "gpu-3"}


def test_a_declared_label_wins_over_the_pods(toml):
    declared = {"COST_METER_LABELS": "node=rack-7,pool=spot"}
    assert load_engine_settings({**POD, **declared}).labels == {
        "namespace": "models", "node": "rack-7", "pod": "chat-7f9-x2x", "pool": "spot",
    }  # fmt: skip
    in_file = {**POD, **toml('labels = { pod = "ours" }')}
    assert load_engine_settings(in_file).labels["pod"] == "ours"


def test_names_of_the_pod_come_on_top_of_as_many_labels_as_may_be_declared():
    most = ",".join(f"n{n}=x" for n in range(16))
    given = {**POD, "COST_METER_LABELS": most}
    assert len(load_settings(given).labels) == 16
    assert len(load_engine_settings(given).labels) == 19


def test_the_longest_name_in_kubernetes_is_a_label():
    assert load_engine_settings({"POD_NAME": "p" * 253}).labels == {"pod": "p" * 253}


@pytest.mark.parametrize("load", [load_settings, load_engine_settings])
@pytest.mark.parametrize("wrong", ["p" * 254, "a\nb"])
def test_a_name_of_a_pod_that_is_no_label_stops_the_start(load, wrong):
    with pytest.raises(SettingError, match="^POD_NAME .environment.: expected 1 to 253 printable"):
        load({"POD_NAME": wrong})


def test_a_label_in_the_file_that_is_no_text_is_an_error(toml):
    with pytest.raises(SettingError, match="labels .*got '5' at 'pool'"):
        load_settings(toml("labels = { pool = 5 }"))
    with pytest.raises(SettingError, match="labels .*got a list"):
        load_settings(toml("labels = [5]"))


def test_an_engine_refuses_somebody_who_can_pay_no_preemption():
    with pytest.raises(SettingError, match="expected victim or operator, got 'tenant'"):
        load_engine_settings({"COST_METER_PREEMPTION_PAID_BY": "tenant"})


def test_an_engine_refuses_a_method_that_is_none():
    with pytest.raises(SettingError, match="expected shapley, tokens or equal, got 'shapely'"):
        load_engine_settings({"COST_METER_METHOD": "shapely"})


# ---- who shares a secret with whom


def with_key(key: str, **more: str) -> dict[str, str]:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return env(tenants=json.dumps([{"name": "acme", "api_key_sha256": [digest]}]), **more)


@pytest.mark.parametrize("name", ["admin_token", "gateway_secret"])
def test_a_secret_in_clear_has_at_least_16_characters(name):
    message = complaint(env(**{name: "fifteen-letters"}))
    assert message.startswith(f"COST_METER_{name.upper()} (environment): expected at least 16")
    assert "fifteen" not in message
    load_settings(env(**{name: "sixteen-letters!"}))


def test_the_admin_token_is_no_tenants_key():
    message = complaint(with_key(SECRET, admin_token=SECRET))
    assert "expected an admin token other than every API key" in message
    assert "'acme'" in message
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    assert "other than every API key" in complaint(with_key(SECRET, admin_token_sha256=digest))


def test_the_admin_token_is_not_the_gateways_secret():
    message = complaint(env(admin_token=SECRET, gateway_secret=SECRET))
    assert "expected an admin token other than the gateway's secret" in message
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    rules = json.dumps([{"rule": "header", "name": "x", "proof_sha256": digest}])
    assert "other than the gateway's secret" in complaint(
        env(admin_token=SECRET, tenant_rules=rules)
    )


def test_the_gateways_secret_is_no_tenants_key():
    message = complaint(with_key(SECRET, gateway_secret=SECRET))
    assert "expected a gateway's secret other than every API key" in message


# ---- requests that no rule names


def test_nobody_may_be_refused_before_somebody_can_be_named():
    message = complaint(env(unnamed_requests="refuse"))
    assert message.startswith("COST_METER_UNNAMED_REQUESTS (environment): expected serve, or")
    load_settings(with_key(SECRET, unnamed_requests="refuse"))
    everybody = json.dumps([{"rule": "constant", "tenant": "everybody"}])
    load_settings(env(unnamed_requests="refuse", tenant_rules=everybody))
