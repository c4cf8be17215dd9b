"""Ask the server that runs, if there is one: what it says of itself counts before these settings.

Invariant: one address is asked, the finding names it, and the token goes nowhere else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from vllm_cost_meter.cli.doctor.findings import Finding, Outcome, failed, fine
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.endpoint.answers import WholeHealth
from vllm_cost_meter.errors import ServerError, StatusError, UnansweredError
from vllm_cost_meter.lab.client import get_json
from vllm_cost_meter.version import __version__

T = TypeVar("T")

EXPECTED = "the side endpoint of a metered server"
HEALTH_TIMEOUT_S = 5.0
# A question that reads the ledger: what a server allows by default, and some more.
QUESTION_TIMEOUT_S = 35.0


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers, and what it says of its health."""

    url: str
    token: str | None
    health: WholeHealth

    def ask(self, path: str, type: type[T]) -> T:
        """Return the answer to a question. Raises ServerError."""
        return get_json(f"{self.url}{path}", self.token, EXPECTED, QUESTION_TIMEOUT_S, type)


@dataclass(frozen=True, slots=True)
class AskedServer:
    """What came of the question for a server, and the server if there is one."""

    finding: Finding
    server: RunningServer | None = None


def ask_server(settings: Settings, url: str | None) -> AskedServer:
    """Ask the server at `url`, or that which these settings name, how its meter does."""
    if url is None and not settings.port:
        detail = "not asked: COST_METER_PORT names no port of its endpoint; --url names a server"
        return AskedServer(fine("server", detail))
    if settings.admin_token is None and settings.admin_token_sha256 is not None:
        detail = "not asked: of the token that it wants, the settings have the SHA-256 only"
        return AskedServer(fine("server", detail))
    at = _address(settings) if url is None else url.rstrip("/")
    token = None if settings.admin_token is None else settings.admin_token.get_secret_value()
    try:
        health = get_json(f"{at}/cost/health", token, EXPECTED, HEALTH_TIMEOUT_S, WholeHealth)
    except UnansweredError as error:
        # Nobody said that one runs, but for who named it.
        return AskedServer(
            Finding("server", Outcome.OK if url is None else Outcome.FAIL, str(error))
        )
    except StatusError as error:
        if error.status == 401:
            detail = f"{at} answers 401 to /cost/health; set COST_METER_ADMIN_TOKEN"
            return AskedServer(failed("server", detail))
        return AskedServer(failed("server", str(error)))
    except ServerError as error:
        return AskedServer(failed("server", str(error)))
    return AskedServer(_healthy(at, health), RunningServer(at, token, health))


def _address(settings: Settings) -> str:
    # Whoever listens on all addresses answers on loopback.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def _healthy(url: str, health: WholeHealth) -> Finding:
    said = list(_wrong(health))
    if not said and health["loops"]:
        said = [f"{', '.join(loop['loop'] for loop in health['loops'])} work"]
    state = Outcome.OK if health["status"] == "ok" else Outcome.FAIL
    found = Finding("server", state, "; ".join([f"{url} says {health['status']}", *said]))
    if health["version"] == __version__:
        return found
    return found.and_also(
        Outcome.WARN, f"it runs cost meter {health['version']}, this is {__version__}"
    )


def _wrong(health: WholeHealth) -> Iterator[str]:
    """Yield what a server says does not work, or did not."""
    for loop in health["loops"]:
        if loop["state"] != "ok":
            failing_s = loop["failing_for_s"] or 0
            yield f"{loop['loop']} fails for {failing_s:.0f} s ({loop['last_error']})"
    if health["status"] == "off":
        yield "the meter switched itself off: see the log, and restart the server"
    if health["ledger_error"] is not None:
        yield f"the ledger cannot be written: {health['ledger_error']}"
    for each in health["side_processes"]:
        if each["restarts"]:
            yield (
                f"the process of the {each['process']} ended {each['restarts']} times, the last"
                f" time it {each['last_end']}"
            )
